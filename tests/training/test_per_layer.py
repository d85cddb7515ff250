from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import less_cache as lc
from less_cache._files import owner_tag
from less_cache.policies import POLICIES
from less_cache.teacher_forced import eviction_times
from less_cache.training import layer as fitting
from less_cache.training import merge, per_layer, train
from less_cache.training.collect import collect_layer
from less_cache.training.per_layer import learning_curves
from tests.integrations.models import build
from tests.policies import MostSeen, MostSeenOneByOne


def same(first: lc.FeatureMaps, second: lc.FeatureMaps) -> bool:
    return first.digest == second.digest


@pytest.fixture(scope="module")
def whole(tokens, config, recipe, tmp_path_factory):
    """What both layers' maps come to when nothing goes wrong, and their folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(build("llama"), tokens, config, recipe, folder, progress=False), folder


def test_maps_beat_the_policy_and_are_saved(model, tokens, config, recipe, tmp_path):
    longer = dataclasses.replace(recipe, epochs=40, dropout=0.0)
    maps = train(model, tokens, config, longer, tmp_path, model_id="tiny", progress=False)
    assert all(share < 0.8 for share in maps.record["validation_error_share"])
    read = lc.FeatureMaps.from_pretrained(tmp_path)
    assert same(read, maps)
    assert read.model_id == "tiny"
    assert read.record["recipe"]["epochs"] == 40
    curves = learning_curves(tmp_path)
    assert [entry["epoch"] for entry in curves[1]] == list(range(1, 41))


@pytest.mark.parametrize("steps", [1, 5, 13])
def test_a_killed_run_goes_on_to_the_same_result(
    model, tokens, config, recipe, whole, tmp_path, dies_after, steps
):
    with dies_after(fitting, fitting._Fit, steps):
        train(model, tokens, config, recipe, tmp_path / "killed", progress=False)
    resumed = train(model, tokens, config, recipe, tmp_path / "killed", progress=False)
    maps, folder = whole
    assert same(maps, resumed)
    assert learning_curves(folder) == learning_curves(tmp_path / "killed")


def test_layers_in_separate_runs_merge_to_the_same(model, tokens, config, recipe, whole, tmp_path):
    parts = [tmp_path / "first", tmp_path / "second"]
    for number, part in enumerate(parts):
        assert train(model, tokens, config, recipe, part, layers=[number], progress=False) is None
    assert same(whole[0], merge(parts, tmp_path / "merged"))


def test_layers_of_rank_0_are_skipped(model, tokens, config, recipe, whole, tmp_path):
    # A layer that keeps everything has nothing to fit either, and hinders nobody.
    part = config.replace(rank=[0, 4], policy=[lc.FullCache(), lc.H2O()], capacity=[64, 8])
    maps = train(model, tokens, part, recipe, tmp_path / "part", progress=False)
    assert maps.rank == (0, 4)
    assert all(torch.equal(t, whole[0][1].tensors[name]) for name, t in maps[1].tensors.items())
    assert maps.record["validation_error_share"][0] is None
    assert not (tmp_path / "part" / "layers" / "000").exists()
    assert train(model, tokens, part, recipe, tmp_path / "a", layers=[0], progress=False) is None
    maps.check_against(part)
    assert same(merge([tmp_path / "part"], tmp_path / "merged"), maps)
    with pytest.raises(ValueError, match=r"^config: rank is 0"):
        train(model, tokens, config.replace(rank=0), recipe, tmp_path / "b", progress=False)


def test_merge_refuses_a_missing_layer_and_other_settings(model, tokens, config, recipe, tmp_path):
    train(model, tokens, config, recipe, tmp_path / "a", layers=[0], progress=False)
    with pytest.raises(FileNotFoundError, match="layer 1"):
        merge([tmp_path / "a"], tmp_path / "out")
    other = dataclasses.replace(recipe, seed=1)
    train(model, tokens, config, other, tmp_path / "b", layers=[1], progress=False)
    with pytest.raises(ValueError, match="recipe"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        merge([tmp_path], tmp_path / "out")


def test_data_on_disk_gives_the_same_and_is_cleared(model, tokens, config, recipe, whole, tmp_path):
    disk = train(model, tokens, config, recipe, tmp_path, data_on_disk=True, progress=False)
    assert same(whole[0], disk)
    assert not list(tmp_path.rglob("*.bin"))


def test_the_papers_recipe_runs(model, tokens, config, tmp_path):
    from less_cache.training import RECIPES

    recipe = dataclasses.replace(RECIPES["paper"], epochs=2, hidden=8)
    maps = train(model, tokens, config, recipe, tmp_path, progress=False)
    assert maps.kind == "paper"


def test_patience_stops_early(model, tokens, config, recipe, tmp_path):
    hopeless = dataclasses.replace(recipe, epochs=50, learning_rate=10.0, patience=2)
    train(model, tokens, config, hopeless, tmp_path, layers=[0], progress=False)
    assert len(learning_curves(tmp_path)[0]) < 50


def test_the_model_is_given_back_as_it_was(model, tokens, config, recipe, tmp_path):
    before = model(tokens[:1]).logits
    train(model, tokens, config, recipe, tmp_path, layers=[0], progress=False)
    torch.testing.assert_close(model(tokens[:1]).logits, before, rtol=0, atol=0)


def test_refuses_another_runs_folder(model, tokens, config, recipe, whole):
    folder = whole[1]
    with pytest.raises(ValueError, match="recipe"):
        train(model, tokens, config, dataclasses.replace(recipe, seed=9), folder, progress=False)
    with pytest.raises(ValueError, match="data_sha256"):
        train(model, tokens - (tokens > 50).long(), config, recipe, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": slice(0, 2)}, "sequences"),
        ({"columns": 8}, "lose nothing"),
        ({"rank": 0}, "rank"),
        ({"layers": [7]}, "layer"),
        ({"policy": lc.FullCache()}, "policy: FullCache.* evicts nothing"),
        ({"rank": 10**8}, "rank, hidden: got 100000000"),
    ],
    ids=lambda value: str(value),
)
def test_refuses_what_cannot_be_fitted(model, tokens, config, recipe, tmp_path, change, message):
    tokens = tokens[change.get("tokens", slice(None)), : change.get("columns", 48)]
    changes = {"rank": 4, "policy": lc.H2O(), **change}
    config = config.replace(rank=changes["rank"], policy=changes["policy"])
    with pytest.raises(ValueError, match=message):
        train(
            model,
            tokens,
            config,
            recipe,
            tmp_path,
            layers=change.get("layers"),
            progress=False,
        )
    # Nothing was written that would be in the way of the corrected run.
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_config_is_not_for_is_refused(tokens, config, recipe, tmp_path):
    with pytest.raises(ValueError, match="kv_heads = 2, but llama has 4"):
        train(build("llama_mha"), tokens, config, recipe, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_another_model_is_not_the_same_run(tokens, config, recipe, whole):
    other = build("llama", seed=1)
    with pytest.raises(ValueError, match="settings: model_sha256 differs"):
        train(other, tokens, config, recipe, whole[1], progress=False)


def test_only_what_differs_is_told(model, tokens, config, recipe, whole):
    other = config.replace(capacity=9, policy=lc.TOVA())
    with pytest.raises(ValueError, match="settings") as error:
        train(model, tokens, other, recipe, whole[1], progress=False)
    assert str(error.value).partition("settings: ")[2] == (
        "config.capacity: 8 there, 9 now, config.policy.name: 'H2O' there, 'TOVA' now, "
        "config.policy.recent: None there, 1 now"
    )


CAPACITIES = [[4, 12], 8]
"""Of two layers of two KV heads."""


def test_capacities_may_differ_by_layer_and_head(model, tokens, config, recipe, tmp_path):
    config = config.replace(capacity=CAPACITIES)
    longer = dataclasses.replace(recipe, epochs=20, dropout=0.0)
    maps = train(model, tokens, config, longer, tmp_path, progress=False)
    assert all(share < 0.95 for share in maps.record["validation_error_share"])
    assert lc.CacheConfig.from_dict(maps.record["config"]) == config
    fitted = fitting._Fit(
        config.layer(0),
        collect_layer(model, tokens, 0, config.layer(0), progress=False),
        recipe,
        0,
    )
    # The head of four slots loses from the fifth token on.
    assert fitted.past.tolist() == list(range(4, 48))


def test_a_layer_that_loses_nothing_is_named(model, tokens, config, recipe, tmp_path):
    config = config.replace(capacity=[8, [48, 64]])
    with pytest.raises(ValueError, match="capacity of 48, layer 1's"):
        train(model, tokens, config, recipe, tmp_path, progress=False)
    # The other layer can be fitted all the same.
    assert train(model, tokens, config, recipe, tmp_path, layers=[0], progress=False) is None


@pytest.mark.parametrize("policy", [MostSeen(), MostSeenOneByOne()], ids=["vectorised", "plain"])
def test_a_policy_of_ones_own_trains(model, tokens, config, recipe, tmp_path, monkeypatch, policy):
    monkeypatch.setattr("less_cache.policies.registry.POLICIES", {**POLICIES})
    lc.register_policy(type(policy))
    config = config.replace(policy=policy, capacity=CAPACITIES)
    short = dataclasses.replace(recipe, epochs=1)
    maps = train(model, tokens, config, short, tmp_path, progress=False)
    assert lc.CacheConfig.from_dict(maps.record["config"]).policies[0] == config.policies[0]
    layer = config.layer(0)
    data = collect_layer(model, tokens, 0, layer, progress=False)
    wanted = eviction_times(layer, data.q, data.k, backend="reference")
    assert torch.equal(data.times, wanted)


def test_a_fit_that_diverges_is_an_error(model, tokens, config, recipe, tmp_path):
    wild = dataclasses.replace(recipe, kind="paper", learning_rate=1e30)
    for _ in range(2):
        # Also when it is started again.
        with pytest.raises(ValueError, match="learning_rate: got 1e"):
            train(model, tokens, config, wild, tmp_path, layers=[0], progress=False)
    assert "Infinity" not in (tmp_path / "layers" / "000" / "log.jsonl").read_text()


def test_two_processes_may_share_a_folder(
    model, tokens, config, recipe, whole, tmp_path, monkeypatch
):
    """One is through while the other still collects; both keep their data in files."""
    original, inside = per_layer.collect_layer, []

    def collect(*given, **named):
        data = original(*given, **named)
        if not inside:
            inside.append(True)
            train(model, tokens, config, recipe, tmp_path, data_on_disk=True, progress=False)
        return data

    monkeypatch.setattr(per_layer, "collect_layer", collect)
    maps = train(model, tokens, config, recipe, tmp_path, data_on_disk=True, progress=False)
    monkeypatch.undo()
    alone, folder = whole
    assert same(maps, alone)
    assert learning_curves(tmp_path) == learning_curves(folder)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.skipif(os.name != "posix", reason="asks after processes as POSIX does")
def test_data_that_a_killed_process_left_goes_away(model, tokens, config, recipe, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = owner_tag().rpartition("-")[0]
    left = tmp_path / "layers" / "000" / f"data.{host}-{gone.pid}.abc"
    left.mkdir(parents=True)
    train(model, tokens, config, recipe, tmp_path, layers=[0], data_on_disk=True, progress=False)
    assert not left.exists()


def test_a_damaged_checkpoint_is_refused(model, tokens, config, recipe, tmp_path):
    train(model, tokens, config, recipe, tmp_path, layers=[0], progress=False)
    folder = tmp_path / "layers" / "000"
    (folder / "maps.safetensors").unlink()
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        train(model, tokens, config, recipe, tmp_path, layers=[0], progress=False)


def test_run_settings_are_json(config, whole):
    run = json.loads((whole[1] / "run.json").read_text())
    assert run["sequences"] == [10, 48]
    assert lc.CacheConfig.from_dict(run["config"]) == config
