from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import less_cache as lc
from less_cache.integrations.transformers.interception import intercepted
from less_cache.integrations.transformers.teacher_forcing import times_under_full_cache
from less_cache.teacher_forced import eviction_times
from less_cache.training import DistillRecipe, distill, end_to_end
from less_cache.training.collect import full_attention
from less_cache.training.distillation import Distillation
from tests.integrations.models import build

RECIPE = DistillRecipe(steps=6, batch=2, validation=2, validate_every=3, learning_rate=3e-3)


@pytest.fixture(scope="module")
def start(config):
    return lc.FeatureMaps.initialise(config, hidden=8)


@pytest.fixture(scope="module")
def whole(tokens, config, start, tmp_path_factory):
    """What RECIPE comes to when nothing goes wrong, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    maps = distill(build("llama"), tokens, config, start, RECIPE, folder, progress=False)
    return maps, folder


def test_loss_falls_and_the_model_stays(model, tokens, config, start, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = DistillRecipe(steps=30, batch=4, validation=2, validate_every=10, learning_rate=1e-2)
    maps = distill(model, tokens, config, start, recipe, tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["validation"] < 0.95 * log[0]["validation"]
    assert maps.record["validation_loss"] == min(entry["validation"] for entry in log)
    assert lc.FeatureMaps.from_pretrained(tmp_path).digest == maps.digest
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


@pytest.mark.parametrize("steps", [1, 4])
def test_a_killed_run_goes_on_to_the_same_result(
    model, tokens, config, start, whole, tmp_path, dies_after, steps
):
    with dies_after(end_to_end, Distillation, steps):
        distill(model, tokens, config, start, RECIPE, tmp_path / "killed", progress=False)
    resumed = distill(model, tokens, config, start, RECIPE, tmp_path / "killed", progress=False)
    maps, folder = whole
    assert resumed.digest == maps.digest
    logs = [(place / "log.jsonl").read_text() for place in (folder, tmp_path / "killed")]
    assert logs[0] == logs[1]


def test_refuses_what_cannot_be_distilled(model, tokens, config, start, tmp_path):
    with pytest.raises(ValueError, match="sequences"):
        distill(model, tokens[:3], config, start, RECIPE, tmp_path, progress=False)
    with pytest.raises(ValueError, match="lose nothing"):
        distill(model, tokens[:, :8], config, start, RECIPE, tmp_path, progress=False)
    full = config.replace(policy=lc.FullCache())
    with pytest.raises(ValueError, match=r"policy: FullCache.* evicts nothing"):
        distill(model, tokens, full, start, RECIPE, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    other = config.replace(rank=5)
    with pytest.raises(ValueError, match="rank"):
        distill(model, tokens, other, start, RECIPE, tmp_path, progress=False)


def test_another_model_is_not_the_same_run(tokens, config, start, whole):
    with pytest.raises(ValueError, match="settings: model_sha256 differs"):
        distill(build("llama", seed=1), tokens, config, start, RECIPE, whole[1], progress=False)


def test_capacities_may_differ_by_layer_and_head(model, tokens, config, start, tmp_path):
    # A layer that loses nothing hinders nobody.
    config = config.replace(capacity=[[4, 12], 64])
    recipe = dataclasses.replace(RECIPE, steps=10, validate_every=10, learning_rate=2e-2)
    distill(model, tokens, config, start, recipe, tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["validation"] < log[0]["validation"]
    assert Distillation(model, tokens, config, recipe, start, None).past == 4


def test_layers_of_rank_0_have_nothing_to_fit(model, tokens, config, tmp_path, dies_after):
    config = config.replace(rank=[0, 4], policy=[lc.FullCache(), lc.H2O()], capacity=[64, 8])
    start = lc.FeatureMaps.initialise(config, hidden=8)
    recipe = dataclasses.replace(RECIPE, steps=6, validate_every=2)
    assert Distillation(model, tokens, config, recipe, start, None).past == 8
    whole = distill(model, tokens, config, start, recipe, tmp_path / "whole", progress=False)
    assert whole.rank == (0, 4)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert whole.record["validation_loss"] < log[0]["validation"]
    with dies_after(end_to_end, Distillation, 3):
        distill(model, tokens, config, start, recipe, tmp_path / "killed", progress=False)
    resumed = distill(model, tokens, config, start, recipe, tmp_path / "killed", progress=False)
    assert resumed.digest == whole.digest


def test_a_distillation_that_diverges_is_an_error(model, tokens, config, tmp_path):
    start = lc.FeatureMaps.initialise(config, hidden=8, kind="paper")
    wild = dataclasses.replace(RECIPE, learning_rate=1e30)
    for _ in range(2):
        with pytest.raises(ValueError, match="learning_rate: got 1e"):
            distill(model, tokens, config, start, wild, tmp_path, progress=False)
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


@torch.no_grad()
def test_evictions_under_the_full_cache_are_the_first_layers_own(model, tokens, config):
    seen = []

    def attend(layer, q, k, v):
        seen.append(eviction_times(config.layer(layer), q, k))
        return full_attention(config.layer(layer), q, k, v)

    with intercepted(model, attend):
        model(tokens, use_cache=False)
    found = times_under_full_cache(model, config, tokens)
    assert len(found) == config.num_layers
    for own, wanted in zip(found, seen, strict=True):
        assert torch.equal(own, wanted)


def test_known_evictions_are_worked_out_once(model, tokens, config, start, tmp_path, monkeypatch):
    calls = []

    def counted(*given, **named):
        calls.append(len(given[2]))
        return times_under_full_cache(*given, **named)

    monkeypatch.setattr("less_cache.training.distillation.times_under_full_cache", counted)
    recipe = dataclasses.replace(RECIPE, full_evictions=True, steps=2)
    distill(model, tokens, config, start, recipe, tmp_path, progress=False)
    assert sum(calls) == len(tokens)
