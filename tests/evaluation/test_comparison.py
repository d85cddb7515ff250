from __future__ import annotations

import json

import pytest
import torch

import less_cache as lc
from less_cache.evaluation.comparison import BASELINE_PLUS, FULL, POLICY, compare
from less_cache.evaluation.generation import accepted_prefix, agreement
from less_cache.evaluation.perplexity import Contestant, Window
from less_cache.evaluation.report import as_table, save_report
from tests.integrations.models import build


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def config(model):
    return lc.CacheConfig.from_model(
        model.config, capacity=8, policy=lc.H2O(), rank=4, dtype=torch.float32
    )


@pytest.fixture
def comparison(model, config):
    draws = torch.Generator().manual_seed(0)
    windows = [Window(f"d{i}", torch.randint(3, 97, (32,), generator=draws)) for i in range(4)]
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    prompts = torch.stack([window.ids[:20] for window in windows])
    return compare(model, windows, config, maps, prompts=prompts, new_tokens=5, progress=False)


def test_has_every_line_with_its_bytes(comparison, config):
    assert [row.name for row in comparison.rows] == [FULL, POLICY, BASELINE_PLUS, "LESS"]
    assert comparison.row("LESS").bytes_per_sequence == config.bytes_per_sequence()
    plus = comparison.row(BASELINE_PLUS)
    assert plus.bytes_per_sequence >= comparison.row("LESS").bytes_per_sequence
    assert plus.capacity > 8
    assert comparison.row(FULL).bytes_per_sequence == 2 * 2 * 2 * 12 * 4 * 32
    assert comparison.row(FULL).accepted == 5
    assert 0 <= comparison.row("LESS").accepted <= 5
    assert comparison.row(POLICY).recovery is None


def test_report_is_complete(comparison, tmp_path):
    save_report(comparison, tmp_path, "a title")
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert [cache["name"] for cache in data["caches"]] == [FULL, POLICY, BASELINE_PLUS, "LESS"]
    assert data["windows"] == 4
    for name in ("positions.png", "recovery.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert as_table(comparison, "a title").row_count == 4


def test_accepted_prefix_stops_at_the_first_difference():
    wanted = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    found = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3]])
    assert accepted_prefix(wanted, found).tolist() == [3, 1, 0]


def test_an_exact_cache_agrees_to_the_end(model):
    exact = lc.CacheConfig.from_model(
        model.config, capacity=64, policy=lc.FullCache(), rank=0, dtype=torch.float32
    )
    prompts = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    found = agreement(model, prompts, [Contestant("exact", exact)], new_tokens=6, batch=2)
    assert found == {"exact": 6.0}


def test_refuses_a_capacity_that_evicts_nothing(model, config):
    window = Window("d", torch.arange(3, 11))
    with pytest.raises(ValueError, match="capacity"):
        compare(model, [window], config, {}, progress=False)
