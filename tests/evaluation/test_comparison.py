from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

import less_cache as lc
from less_cache.evaluation.comparison import (
    BASELINE_PLUS,
    FULL,
    POLICY,
    Comparison,
    Row,
    coded_name,
    compare,
    contestants_for,
)
from less_cache.evaluation.generation import accepted_prefix, agreement
from less_cache.evaluation.perplexity import Contestant, Recovery, Window, recovery, score
from less_cache.evaluation.report import as_table, gap_text, save_report
from less_cache.training import calibrate
from tests.integrations.models import build
from tests.policies import MostSeen, MostSeenOneByOne


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
    assert plus.slots == str(plus.capacity)
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


def windows_of(count, length):
    draws = torch.Generator().manual_seed(0)
    return [Window(f"d{i}", torch.randint(3, 97, (length,), generator=draws)) for i in range(count)]


def test_capacities_may_differ_by_layer_and_head(model, config, tmp_path):
    config = config.replace(capacity=[[4, 12], 64])
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    found = compare(model, windows_of(2, 32), config, maps, progress=False)
    less, plus = found.row("LESS"), found.row(BASELINE_PLUS)
    assert less.slots == "4 to 64, mean 36.0"
    assert less.bytes_per_sequence == config.bytes_per_sequence()
    assert [len(layer) if isinstance(layer, tuple) else 1 for layer in plus.capacity] == [2, 1]
    assert all(more > own for more, own in zip(plus.capacity[0], (4, 12), strict=True))
    save_report(found, tmp_path, "a title")
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["capacity"] == [[4, 12], 64]


@pytest.mark.parametrize("policy", [MostSeen(), MostSeenOneByOne()], ids=["vectorised", "plain"])
def test_a_policy_of_ones_own_is_judged(model, config, policy):
    config = config.replace(policy=policy)
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    found = compare(model, windows_of(2, 24), config, maps, progress=False)
    assert found.row(POLICY).perplexity > 1


def test_maps_of_another_model_are_refused(model, config):
    other = config.replace(kv_heads=4)
    maps = {"LESS": lc.FeatureMaps.initialise(other, hidden=8)}
    with pytest.raises(ValueError, match=r"maps: 'LESS' does not fit the model.*kv_heads = 4"):
        compare(model, windows_of(1, 24), config, maps, progress=False)
    with pytest.raises(ValueError, match="evicts nothing"):
        compare(model, windows_of(1, 24), config.replace(policy=lc.FullCache()), {}, progress=False)


def test_one_document_has_no_interval(model, config, tmp_path):
    """Drawn with replacement it is always itself: that is no certainty."""
    windows = [Window("d", window.ids) for window in windows_of(2, 32)]
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    found = compare(model, windows, config, maps, progress=False)
    row = dataclasses.replace(found.row("LESS"), recovery=Recovery(0.2, math.nan, math.nan))
    assert gap_text(row) == "20% (one document)"
    scores = [found.scores[name] for name in (FULL, POLICY, "LESS")]
    scores[0].losses = [losses - 1 for losses in scores[0].losses]
    regained = recovery(*scores)
    assert math.isfinite(regained.share)
    assert math.isnan(regained.low)
    save_report(Comparison([found.row(FULL), found.row(POLICY), row], {}), tmp_path, "title")
    assert '"low": null' in (tmp_path / "comparison.json").read_text()


def test_a_name_of_the_table_is_taken(model, config):
    maps = {FULL: lc.FeatureMaps.initialise(config, hidden=8)}
    with pytest.raises(ValueError, match="the name 'full cache'"):
        compare(model, windows_of(1, 24), config, maps, progress=False)


@pytest.mark.parametrize("capacity", [52, ((16, 128), 1024)])
def test_the_table_fits_eighty_columns(capacity):
    def row(name, recovered):
        share = Recovery(0.23, 0.216, 0.24) if recovered else None
        return Row(name, capacity, 37_584_896, 1234.56, 2345.67, share, 64.0, [], [])

    rows = [row(FULL, False), row(POLICY, False), row(BASELINE_PLUS, True)]
    rows += [row("LESS distilled", True), row("LESS [/b]", False)]
    console = Console(width=80, file=io.StringIO())
    console.print(as_table(Comparison(rows, {}), "[a title]"))
    told = console.file.getvalue()
    assert "\u2026" not in told
    for word in ("perplexity", "recovered", "sequence", "accepted", "37,584,896", "LESS [/b]"):
        assert word in told
    assert "[a title]" in told
    assert "(22% to 24%)" in told
    assert "no gap" in told


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_coded_slots_are_compared_at_equal_bytes(model, config, kind, tmp_path):
    config = config.replace(capacity=24, quantization=lc.Quantization(3, 2, kind))
    windows = windows_of(2, 32)
    ids = torch.stack([window.ids for window in windows])
    transforms = calibrate(model, config, ids, progress=False) if kind == "calibrated" else None
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    prompts = ids[:, :28]
    found = compare(
        model, windows, config, maps, transforms=transforms, prompts=prompts, new_tokens=2,
        progress=False,
    )  # fmt: skip
    coded = coded_name(config.quantization)
    assert [row.name for row in found.rows] == [FULL, POLICY, coded, BASELINE_PLUS, "LESS"]
    less, policy = found.row("LESS"), found.row(POLICY)
    assert found.row(coded).slots == less.slots == "24"
    # Counted in 16 bits, though the model is of 32; one slot more or less is rounding.
    slot = config.replace(quantization=None, dtype="float16").layer(0).slot_bytes
    assert less.bytes_per_sequence == config.bytes_per_sequence("float16")
    assert 0 <= policy.bytes_per_sequence - less.bytes_per_sequence < 2 * 2 * slot
    assert found.row(FULL).bytes_per_sequence == 2 * 2 * 2 * 12 * 2 * 32
    assert found.facts["bytes_counted_in"] == "float16"
    assert found.facts["transforms_sha256"] == (transforms.digest if transforms else None)
    exact = score(
        model,
        windows,
        Contestant("plain", config.replace(quantization=None), *maps.values()),
        progress=False,
    )
    assert less.perplexity != pytest.approx(exact.perplexity(), rel=1e-4)
    save_report(found, tmp_path, "a title")
    assert json.loads((tmp_path / "comparison.json").read_text())["quantization"]["key_bits"] == 3


def test_layers_of_other_ranks_and_bits_are_compared(model, config):
    codes = [None, lc.Quantization(3, 3)]
    config = config.replace(capacity=24, rank=[4, 0], quantization=codes)
    maps = {"LESS": lc.FeatureMaps.initialise(config, hidden=8)}
    found = compare(model, windows_of(2, 32), config, maps, progress=False)
    names = [FULL, POLICY, "coded slots", BASELINE_PLUS, "LESS"]
    assert [row.name for row in found.rows] == names
    assert found.facts["rank"] == (4, 0)
    assert found.facts["quantization"] == [None, codes[1].to_dict()]
    less, plus = found.row("LESS"), found.row(BASELINE_PLUS)
    assert less.bytes_per_sequence == config.bytes_per_sequence("float16")
    # Each layer's state goes into slots of its own.
    assert (plus.capacity[0] > 24, plus.capacity[1]) == (True, 24)
    slots = [entry.config.capacity for entry in contestants_for(config, maps, 32)[1:3]]
    assert slots[0][0] > slots[0][1]
    assert slots[1] == 24


def test_codes_alone_need_no_maps_and_bases_where_they_are_calibrated(model, config):
    config = config.replace(capacity=24, quantization=lc.Quantization(3, 3))
    found = compare(model, windows_of(2, 32), config, {}, progress=False)
    assert [row.name for row in found.rows] == [FULL, POLICY, "3-bit slots"]
    with pytest.raises(ValueError, match=r"^transforms: got None"):
        contestants_for(config.replace(quantization=lc.Quantization(3, 3, "calibrated")), {}, 32)
    taken = {"3-bit slots": lc.FeatureMaps.initialise(config, hidden=8)}
    with pytest.raises(ValueError, match="the name '3-bit slots'"):
        contestants_for(config, taken, 32)
    with pytest.raises(
        ValueError, match=r"^capacity: in uncoded slots of the same bytes: capacity"
    ):
        contestants_for(config.replace(policy=lc.SinkWindow(sinks=16), rank=0), {}, 32)
