"""A state belongs to one thread at a time; who comes meanwhile is told."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import less_cache as lc
from tests.helpers import bits_of, random_maps, small_config, torch_inputs


class Waiting(lc.Policy):
    """Stops in the middle of a call until it is told to go on."""

    vectorised = True
    inside = threading.Event()
    go_on = threading.Event()

    def update(self, xp, scores, history, probabilities, visible):
        Waiting.inside.set()
        assert Waiting.go_on.wait(60)
        return scores, history


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_second_thread_is_refused_and_the_first_one_ends_well(backend, tokens):
    config = small_config(policy=Waiting())
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state, alone = manager.init(2), manager.init(2)
    inputs = torch_inputs(config, 2, tokens)
    Waiting.go_on.set()
    expected = manager.attend(alone, 0, *inputs)
    Waiting.inside.clear()
    Waiting.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(manager.attend, state, 0, *inputs)
        assert Waiting.inside.wait(60)
        try:
            for layer in range(2):
                with pytest.raises(RuntimeError, match=r"^state: another call of attend\(\)"):
                    manager.attend(state, layer, *inputs)
        finally:
            Waiting.go_on.set()
        assert torch.equal(first.result(), expected)
    assert bits_of(state) == bits_of(alone)
    manager.attend(state, 0, *inputs)


def test_a_call_that_fails_leaves_the_state_free():
    config = small_config(policy=lc.FullCache(), capacity=4, rank=0)
    manager = lc.CacheManager(config)
    state = manager.init(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="capacity = 4"):
            manager.attend(state, 0, *torch_inputs(config, 1, 5))
    manager.attend(state, 0, *torch_inputs(config, 1, 4))


def test_threads_with_states_of_their_own_share_a_manager():
    config = small_config()
    manager = lc.CacheManager(config, random_maps(config))
    inputs = torch_inputs(config, 1, 40)

    def decode(_):
        state = manager.init(1)
        parts = [[x[:, :, i : i + 1] for x in inputs] for i in range(40)]
        return torch.cat([manager.attend(state, 0, *part) for part in parts], 2)

    expected = decode(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(decode, range(8)))
