from __future__ import annotations

import builtins
import os

import pytest
import torch

from less_cache.distributed import Ray, run_tasks
from tests import distributed_tasks as tasks

NUMBERS = [(3,), (1,), (2,), (5,)]


def test_in_this_process_tasks_run_in_order():
    found = run_tasks(tasks.add, NUMBERS, shared=(10,))
    assert [total for total, _, _ in found] == [13, 11, 12, 15]
    assert {process for _, process, _ in found} == {os.getpid()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": ""}, "ray: got ''"),
        ({"num_gpus": -1}, "num_gpus: got -1"),
        ({"num_cpus": "two"}, "num_cpus: got 'two'"),
        ({"retries": -1}, "retries: got -1"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Ray(**changes)


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **named):
        if name == "ray":
            raise ImportError(name)
        return original(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"less_cache\[ray\]"):
        run_tasks(tasks.add, NUMBERS, shared=(1,), on=Ray())


def test_on_a_cluster_results_are_the_same_in_the_same_order(cluster):
    found = run_tasks(tasks.add, NUMBERS, shared=(10,), on=cluster)
    assert [total for total, _, _ in found] == [13, 11, 12, 15]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {torch.get_num_threads()}


def test_a_task_whose_worker_is_killed_is_started_again(cluster, tmp_path):
    found = run_tasks(tasks.add_at_the_second_try, NUMBERS, shared=(str(tmp_path),), on=cluster)
    assert found == [4, 2, 3, 6]


def test_a_task_whose_workers_always_die_is_given_up(cluster):
    with pytest.raises(RuntimeError, match="died 2 times"):
        run_tasks(tasks.die, [(1,)], on=Ray(retries=1))


def test_what_a_task_raises_is_raised_here(cluster):
    with pytest.raises(ValueError, match="number: got 1"):
        run_tasks(tasks.refuse, NUMBERS, on=cluster)
