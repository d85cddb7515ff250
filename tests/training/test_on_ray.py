"""Training on a local cluster of two workers comes to what one process comes to, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest

import less_cache as lc
from less_cache.training import train
from less_cache.training.per_layer import layer_folder, learning_curves
from tests.killing import Killer


def test_a_cluster_comes_to_the_same_maps(model, tokens, config, recipe, tmp_path, cluster):
    here = train(model, tokens, config, recipe, tmp_path / "here", progress=False)
    there = train(model, tokens, config, recipe, tmp_path / "there", on=cluster, progress=False)
    assert there.digest == here.digest
    assert learning_curves(tmp_path / "there") == learning_curves(tmp_path / "here")
    assert lc.FeatureMaps.from_pretrained(tmp_path / "there").digest == here.digest


def test_a_worker_that_is_killed_midway_makes_no_difference(
    model, tokens, config, recipe, tmp_path, cluster
):
    longer = dataclasses.replace(recipe, epochs=150)
    here = train(model, tokens, config, longer, tmp_path / "here", progress=False)
    log = layer_folder(tmp_path / "there", 0) / "log.jsonl"
    killer = Killer("_fit_one", lambda: log.exists() and log.read_text().count("\n") >= 1)
    killer.start()
    there = train(model, tokens, config, longer, tmp_path / "there", on=cluster, progress=False)
    killer.join()
    assert killer.killed
    assert there.digest == here.digest


def test_what_cannot_be_fitted_is_refused_as_in_one_process(
    model, tokens, config, recipe, tmp_path, cluster
):
    hopeless = dataclasses.replace(recipe, learning_rate=1e30)
    with pytest.raises(ValueError, match="learning_rate"):
        train(model, tokens, config, hopeless, tmp_path, on=cluster, progress=False)
