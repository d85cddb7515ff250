"""Tuning on a local cluster of two workers comes to what one process comes to, bit for bit."""

from __future__ import annotations

import pytest

from tests.killing import Killer
from tests.tuning.tiny import run


def test_a_cluster_one_of_whose_workers_is_killed_comes_to_the_same_cache(tmp_path, cluster):
    here = run(tmp_path / "here")
    there = tmp_path / "there"
    killer = Killer("_run_stage", lambda: any((there / "work" / "states").glob("*/log.jsonl")))
    killer.start()
    found = run(there, on=cluster)
    killer.join()
    assert killer.killed
    assert found.recipe.digest == here.recipe.digest
    for name in ("verdicts", "curve", "losses", "predicted", "taken"):
        assert found.report[name] == here.report[name]
    # One process goes on from what a cluster left, and measures nothing anew.
    losses = [*(there / "work").glob("*/*.json"), *(there / "work").glob("states/*/*.json")]
    before = {path: path.stat().st_mtime_ns for path in losses}
    (there / "less_cache.safetensors").unlink()
    assert run(there).recipe.digest == here.recipe.digest
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_what_cannot_be_tuned_is_refused_as_in_one_process(tmp_path, cluster):
    with pytest.raises(ValueError, match="budget: got 100"):
        run(tmp_path, budget=100, on=cluster)
