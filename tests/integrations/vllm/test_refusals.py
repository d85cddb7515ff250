"""What cannot work is refused when the configuration is complete: before anything is loaded."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import less_cache as lc
from tests.integrations.vllm.engines import CACHE, options

pytest.importorskip("vllm", reason="needs vLLM: make vllm sets up an environment with it")


def configured(less=None, **engine):
    """vLLM's configuration, as an engine makes it."""
    from vllm import EngineArgs

    return EngineArgs(**options(less, **engine)).create_engine_config()


def refused(less=None, **engine):
    """Why there is none."""
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        configured(less, **engine)
    return str(caught.value)


def test_the_scheduler_is_chosen_and_sliding_layers_keep_their_own():
    config = configured()
    assert config.scheduler_config.scheduler_cls == "less_cache.integrations.vllm.scheduler.Chunks"
    chosen = config.attention_config.backend_per_kind
    assert {kind: backend.name for kind, backend in chosen.items()} == {"full_attention": "CUSTOM"}


def test_without_less_cache_vllm_is_as_ever():
    config = configured(attention_backend=None, additional_config={})
    assert config.scheduler_config.scheduler_cls is None
    assert config.attention_config.backend_per_kind == {}


@pytest.mark.parametrize(
    ("less", "message"),
    [
        ("5%", "less_cache: got str, expected an object with some of cache, capacity"),
        ([1], "less_cache: got list, expected an object"),
        ({}, "less_cache: capacity: missing"),
        ({"capacity": 52, "slots": 3}, r"less_cache: unknown option\(s\) slots, expected some of"),
        ({"capacity": 52, "policy": "lru"}, "less_cache: policy: got 'lru', expected one of"),
        ({"capacity": 52, "policy": 3}, "less_cache: policy: got 3, expected a text"),
        ({"capacity": 0}, "less_cache: capacity: got 0"),
        ({"capacity": "lots"}, "less_cache: capacity: got 'lots'"),
        ({"capacity": [52, 52]}, "less_cache: capacity: got 2 entries, expected one, or 6"),
        ({"capacity": 52, "rank": 8}, "less_cache: maps: missing, but rank = 8 needs"),
        ({**CACHE, "rank": 0}, "less_cache: maps: given, but rank = 0"),
        ({**CACHE, "rank": 4}, "less_cache: maps: layer 0 has rank = 8, expected 4"),
        ({"capacity": 52, "maps": "no/such/folder"}, "less_cache: .*no/such/folder"),
        ({"capacity": 52, "bits": 5}, "less_cache: key_bits: got 5, expected one of"),
        ({"capacity": 52, "key_bits": 4}, "less_cache: bits: expected bits, or both"),
        ({"capacity": 52, "prompt_chunk": 0}, "less_cache: prompt_chunk: got 0"),
        ({"capacity": 52, "backend": "cuda"}, "less_cache: backend: got 'cuda', expected auto"),
        (
            {"capacity": 52, "policy": "fullcache"},
            "max_model_len: got 1024, but FullCache",
        ),
        ({"capacity": 52, "prompt_chunk": 4096}, None),
    ],
)
def test_options_that_cannot_be(less, message):
    if message is None:
        # No prompt is longer than max_model_len: a larger chunk asks for no more room.
        configured(less)
        return
    assert re.search(message, refused(less))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"attention_backend": None}, "less_cache: given, but the attention backend is None: add"),
        ({"additional_config": {}}, "additional_config: has no less_cache"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 cannot be had with it"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                    "prompt_lookup_max": 3}},
            "speculative decoding cannot be had with it",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "a KV connector cannot be had with it",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism cannot be had with it"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "context parallel"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler class .* brings"),
        ({"max_num_batched_tokens": 1030}, "got 1030, expected at least 1039"),
        ({"long_prefill_token_threshold": 64}, "long_prefill_token_threshold: got 64"),
    ],
)  # fmt: skip
def test_features_that_cannot_be_had_with_it(engine, message):
    assert re.search(message, refused(**engine))


def test_untested_versions_are_refused(monkeypatch):
    monkeypatch.setattr("vllm.version.__version__", "0.33.1")
    assert "vLLM 0.33.1 is installed, but this plugin was tested with 0.32" in refused()


def test_damaged_maps_are_refused(tmp_path):
    (tmp_path / "maps.json").write_text("{")
    save_file({"a": torch.zeros(1)}, tmp_path / "maps.safetensors")
    assert str(tmp_path) in refused({"capacity": 52, "maps": str(tmp_path)})


def test_maps_of_another_model_are_refused(tmp_path):
    config = lc.CacheConfig(6, 8, 4, 64, capacity=52, policy=lc.H2O(), rank=8)
    lc.FeatureMaps.initialise(config, hidden=4).save_pretrained(tmp_path)
    assert "query_heads = 8, expected 4" in refused({"capacity": 52, "maps": str(tmp_path)})


def test_the_command_line_takes_no_broken_json():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--additional-config", '{"less_cache": {"capacity": 52}'])
    given = parser.parse_args(["--additional-config", json.dumps({"less_cache": CACHE})])
    assert given.additional_config == {"less_cache": CACHE}
