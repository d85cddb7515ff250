"""The options, where no vLLM is needed to look at them."""

from __future__ import annotations

import copy
import json

import pytest

import less_cache as lc
from less_cache import reference_model
from less_cache.integrations.introspection import description
from less_cache.integrations.vllm.settings import PROMPT_CHUNK, Settings
from tests.integrations.vllm.engines import CACHE


@pytest.fixture(scope="module")
def model_config():
    return reference_model.load()[0].config


def test_the_shipped_cache(model_config):
    settings = Settings.from_dict(CACHE)
    assert (settings.prompt_chunk, settings.backend) == (PROMPT_CHUNK, "auto")
    parts = settings.parts(model_config, "bfloat16")
    assert parts.config == lc.CacheConfig.from_model(
        model_config, capacity="5%", policy=lc.H2O(), rank=8, dtype="bfloat16"
    )
    assert parts.maps is not None
    assert len(parts.maps) == 6
    assert parts.transforms is None


def test_maps_for_another_policy_are_warned_of(model_config, caplog):
    without = {name: value for name, value in CACHE.items() if name != "policy"}
    Settings.from_dict({**without, "capacity": "4%"}).parts(model_config, "float32")
    assert "maps: trained for H2O" in caplog.text
    assert "not SinkWindow" in caplog.text


def test_files_are_read_once(model_config):
    settings = Settings.from_dict(CACHE)
    assert settings.parts(model_config, "float32") is settings.parts(model_config, "float32")


def test_capacities_by_head_and_a_policy_of_many_fields(model_config):
    policy = json.dumps(lc.SinkWindow(sinks=2, recent=5).to_dict())
    given = {"capacity": [8, 9, [10, 11, 12, 13], 8, 8, 8], "policy": policy, "bits": 3}
    config = Settings.from_dict(given).parts(model_config, "float32").config
    assert config.capacities[2] == (10, 11, 12, 13)
    assert config.policies[0] == lc.SinkWindow(sinks=2, recent=5)
    assert config.quantization == lc.Quantization(3, 3)
    assert config.rank == 0


@pytest.fixture(scope="module")
def folder(model_config, tmp_path_factory):
    """A tuned cache of the reference model."""
    parts = Settings.from_dict(CACHE).parts(model_config, "float32")
    out = tmp_path_factory.mktemp("cache")
    told = description(model_config)
    lc.CacheRecipe(parts.config, parts.maps, model=told).save_pretrained(out)
    return out


def test_a_tuned_folder_says_it_all(model_config, folder):
    wanted = Settings.from_dict(CACHE).parts(model_config, "bfloat16")
    found = Settings.from_dict({"cache": str(folder)}).parts(model_config, "bfloat16")
    assert found.config == wanted.config
    assert found.maps is not None
    assert wanted.maps is not None
    assert found.maps.digest == wanted.maps.digest


def test_a_folder_of_another_model_is_refused(model_config, folder):
    other = copy.deepcopy(model_config)
    other.num_key_value_heads = 2
    with pytest.raises(ValueError, match="less_cache: recipe: made for a model of kv_heads = 4"):
        Settings.from_dict({"cache": str(folder)}).parts(other, "float32")


def test_a_folder_that_is_none_is_refused(model_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"less_cache: .*holds no"):
        Settings.from_dict({"cache": str(tmp_path)}).parts(model_config, "float32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": "folder", "bits": 3}, "less_cache: bits: given with cache"),
        (None, "less_cache: got NoneType, expected an object"),
        ({"slots": 3}, r"less_cache: unknown option\(s\) slots"),
        ({}, "less_cache: capacity: missing"),
        ({"capacity": 8, "prompt_chunk": True}, "less_cache: prompt_chunk: got True"),
        ({"capacity": 8, "maps": 3}, "less_cache: maps: got 3, expected a text"),
        ({"capacity": 8, "backend": "best"}, "less_cache: backend: got 'best'"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Settings.from_dict(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capacity": 0}, "less_cache: capacity: got 0"),
        ({"capacity": 8, "policy": "lru"}, "less_cache: policy: got 'lru'"),
        ({"capacity": 8, "policy": "{"}, "less_cache: policy: no valid JSON"),
        ({"capacity": 8, "rank": 2}, "less_cache: maps: missing, but rank = 2"),
        ({"capacity": 8, "rank": "2"}, "less_cache: rank: got '2'"),
        ({"capacity": 8, "bits": 5}, "less_cache: key_bits: got 5"),
        ({"capacity": 8, "value_bits": 4}, "less_cache: bits: expected bits, or both"),
        ({"capacity": 8, "transforms": "no/such.file"}, "less_cache: .*no/such.file"),
    ],
)
def test_caches_that_cannot_be(model_config, given, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        Settings.from_dict(given).parts(model_config, "float32")
