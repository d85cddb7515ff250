"""Attention in blocks of queries, which devices other than a CPU take, and histories."""

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.backends.torch import attention
from tests.helpers import (
    POLICIES,
    assert_same_state,
    held_by,
    policy_id,
    random_maps,
    small_config,
    torch_inputs,
)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
@pytest.mark.parametrize("block_bytes", [1, 700, 5000])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, policy, block_bytes):
    config = small_config(
        policy=policy, capacity=40 if policy == POLICIES[0] else 7, dtype="float64"
    )
    manager = lc.CacheManager(config, random_maps(config), backend="torch")
    monkeypatch.setattr(attention, "fastest", lambda _: attention.in_blocks)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(0)) < 0.8
    results = []
    for size in (attention.BLOCK_BYTES, block_bytes):
        monkeypatch.setattr(attention, "BLOCK_BYTES", size)
        state = manager.init(2)
        manager.attend(state, 0, *torch_inputs(config, 2, 5, seed=1))
        out = manager.attend(state, 0, *torch_inputs(config, 2, 13, seed=2), mask)
        results.append((out, held_by(state.layers[0], config.layer(0))))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=1e-12)
    assert_same_state(results[1][1], results[0][1], 1e-12)


@pytest.mark.parametrize("window", [1, 31, 32, 61, 62])
@pytest.mark.parametrize("tokens", [1, 7, 80])
def test_a_history_holds_its_whole_window(window, tokens):
    config = small_config(
        policy=lc.Scissorhands(recent=0, window=window), capacity=90, rank=0, dtype="float64"
    )
    managers = [lc.CacheManager(config, backend=name) for name in ("reference", "torch")]
    states = [manager.init(1) for manager in managers]
    for _ in range(80 // tokens):
        inputs = torch_inputs(config, 1, tokens)
        for manager, state in zip(managers, states, strict=True):
            manager.attend(state, 0, *inputs)
    held = [held_by(state.layers[0], config.layer(0)) for state in states]
    np.testing.assert_array_equal(held[0].history, held[1].history)
    np.testing.assert_array_equal(held[0].scores, held[1].scores)
    assert held[0].history.max() < 2**window
    assert held[0].scores.max() <= window
