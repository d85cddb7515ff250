"""NaN and infinity stay with the token that brought them, and with those that see it."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.backends.torch import attention
from tests.helpers import POLICIES, policy_id, random_maps, small_config, torch_inputs
from tests.policies import MostSeen

BAD = (float("nan"), float("inf"), -float("inf"))
BACKENDS = ("torch", "torch in blocks", "reference")
CASES = (*POLICIES, MostSeen())


def managed(backend, policy, monkeypatch, **changes):
    if backend == "torch in blocks":
        # The way of devices that nobody waits for.
        monkeypatch.setattr(attention, "fastest", lambda device: attention.in_blocks)
    capacity = 60 if isinstance(policy, lc.FullCache) else 6
    config = small_config(policy=policy, capacity=capacity, num_layers=1, **changes)
    return lc.CacheManager(config, random_maps(config), backend=backend.partition(" ")[0])


@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", CASES, ids=policy_id)
def test_earlier_tokens_of_the_call_are_not_touched(policy, backend, where, monkeypatch):
    manager = managed(backend, policy, monkeypatch, softcap=5.0 if where == "both" else None)
    check_earlier_tokens(manager, where, (0, 4, 9))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_earlier_tokens_are_not_touched_by_kernels(monkeypatch):
    # The interpreter is slow, and all policies share the kernels of a chunk.
    manager = managed("triton", lc.H2O(), monkeypatch, softcap=5.0)
    check_earlier_tokens(manager, "both", (4,))


def check_earlier_tokens(manager, where, befores):
    for before in befores:
        good, bad = manager.init(2), manager.init(2)
        if before:
            for state in (good, bad):
                manager.attend(state, 0, *torch_inputs(manager.config, 2, before, seed=3))
        q, k, v = torch_inputs(manager.config, 2, 12)
        wanted = manager.attend(good, 0, q, k, v)
        for row, (token, value) in enumerate([(7, BAD[0]), (3, BAD[1])]):
            k[row, 1, token, 2] = value if where != "v" else k[row, 1, token, 2]
            v[row, 1, token, 1] = value if where != "k" else v[row, 1, token, 1]
        # A second one, in the other head.
        v[0, 0, 10] = BAD[2]
        found = manager.attend(bad, 0, q, k, v)
        for row, token in enumerate([7, 3]):
            torch.testing.assert_close(found[row, 2:, :token], wanted[row, 2:, :token])
            if value_is_seen(where):
                assert not found[row, 2:, token:].isfinite().all(2).any()
        torch.testing.assert_close(found[0, :2, :10], wanted[0, :2, :10])
        torch.testing.assert_close(found[1, :2], wanted[1, :2])
        assert not found[0, :2, 10:].isfinite().any()


def value_is_seen(where):
    # An infinite key may as well make a pair's weight 0.
    return where != "k"


@pytest.mark.parametrize("tokens", [300, 900])
def test_long_prompts_of_one_query_head_a_key(tokens):
    # In one block of many, and where PyTorch's own flash attention would take the first queries.
    config = lc.CacheConfig(1, 2, 2, 8, capacity=20, policy=lc.SinkWindow(), rank=0)
    manager = lc.CacheManager(config)
    q, k, v = torch_inputs(config, 1, tokens)
    wanted = manager.attend(manager.init(1), 0, q, k, v)
    k[0, 1, 280], v[0, 0, 270] = BAD[0], BAD[0]
    found = manager.attend(manager.init(1), 0, q, k, v)
    torch.testing.assert_close(found[0, 1, :280], wanted[0, 1, :280], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0, 0, :270], wanted[0, 0, :270], atol=1e-5, rtol=1e-5)
    assert found[0, 1, 280:].isnan().all()
    assert found[0, 0, 270:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", CASES, ids=policy_id)
@pytest.mark.parametrize("tokens", [1, 9])
def test_padding_may_hold_anything(policy, backend, tokens, monkeypatch):
    manager = managed(backend, policy, monkeypatch)
    mask = torch.tensor([[True] * tokens, [i % 3 == 1 for i in range(tokens)], [False] * tokens])
    outs = []
    for filler in (0.0, *BAD):
        state = manager.init(3)
        manager.attend(state, 0, *torch_inputs(manager.config, 3, 8, seed=3))
        inputs = [
            x.masked_fill(~mask[:, None, :, None], filler)
            for x in torch_inputs(manager.config, 3, tokens)
        ]
        out = manager.attend(state, 0, *inputs, mask)
        later = manager.attend(state, 0, *torch_inputs(manager.config, 3, 2, seed=9))
        outs.append(torch.cat([out, later], 2))
    assert outs[0].isfinite().all()
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


def test_the_reference_in_numpy():
    config = small_config(num_layers=1, dtype="float64")
    manager = lc.CacheManager(config, random_maps(config), backend="reference")
    q, k, v = (x.numpy() for x in torch_inputs(config, 1, 9))
    wanted = manager.attend(manager.init(1, dtype=np.float64), 0, q, k, v)
    v[0, 0, 5] = np.nan
    found = manager.attend(manager.init(1, dtype=np.float64), 0, q, k, v)
    np.testing.assert_allclose(found[:, :, :5], wanted[:, :, :5])
    np.testing.assert_allclose(found[:, 2:], wanted[:, 2:])
    assert np.isnan(found[0, :2, 5:]).all()
