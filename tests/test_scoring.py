"""Tokens of one call attend as if they came one by one, and gradients flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import less_cache as lc
from less_cache.scoring import attend_from_empty, attend_one_by_one
from tests.helpers import POLICIES, bits_of, policy_id, random_maps, torch_inputs
from tests.policies import MostSeen, MostSeenOneByOne

TOKENS = 22
CASES = (*POLICIES, MostSeen(), MostSeenOneByOne())


def configured(policy: lc.Policy, **changes: Any) -> lc.CacheConfig:
    parameters: dict[str, Any] = {
        "num_layers": 1,
        "query_heads": 6,
        "kv_heads": 3,
        "head_dim": 4,
        # The first two heads are one run.
        "capacity": 60 if isinstance(policy, lc.FullCache) else [[7, 7, 9]],
        "policy": policy,
        "rank": 3,
        "dtype": "float64",
    }
    return lc.CacheConfig(**{**parameters, **changes})


def masks(side: str | None) -> torch.Tensor | None:
    if side is None:
        return None
    counts = torch.tensor([TOKENS, 13, 0]).view(-1, 1)
    columns = torch.arange(TOKENS)
    return columns < counts if side == "right" else columns >= TOKENS - counts


def parts(inputs, start, stop):
    return [x[:, :, start:stop] for x in inputs]


def token_by_token(manager, state, inputs, mask):
    outs = []
    for i in range(TOKENS):
        own = None if mask is None else mask[:, i : i + 1]
        outs.append(manager.attend(state, 0, *parts(inputs, i, i + 1), own))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("before", [0, 4, 20])
@pytest.mark.parametrize("policy", CASES, ids=policy_id)
def test_equals_one_call_a_token(policy, before, side):
    config = configured(policy, softcap=5.0 if side == "left" else None)
    manager = lc.CacheManager(config, random_maps(config, "paper" if before == 4 else "exp"))
    state, mask = manager.init(3), masks(side)
    if before:
        # Rows of different lengths, of which one has seen nothing.
        seen = torch.arange(before) < torch.tensor([before, 0, before - 1]).view(-1, 1)
        manager.attend(state, 0, *torch_inputs(config, 3, before, seed=5), seen)
    inputs = torch_inputs(config, 3, TOKENS)
    alone, learning = state.clone(), state.clone()
    wanted = token_by_token(manager, state, inputs, mask)
    found = attend_one_by_one(manager, alone, 0, *inputs, mask)
    if policy.evicts:
        assert torch.equal(found, wanted)
        assert bits_of(alone) == bits_of(state)
    # A cache that evicts nothing takes them all at once.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert torch.equal(alone.length, state.length)
    leaves = [x.clone().requires_grad_() for x in inputs]
    learnt = attend_one_by_one(manager, learning, 0, *leaves, mask)
    assert learnt.requires_grad
    torch.testing.assert_close(learnt, wanted, rtol=0, atol=1e-9)
    assert bits_of(learning) == bits_of(alone)
    if not before:
        maps = manager.maps[0]
        empty = attend_from_empty(config.layer(0), maps, *inputs, mask)
        torch.testing.assert_close(empty, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("before", [0, 20])
def test_gradients_are_those_of_the_step_written_out(before, rank):
    config = configured(lc.H2O(), rank=rank)
    manager = lc.CacheManager(config, random_maps(config))
    state = manager.init(3)
    if before:
        manager.attend(state, 0, *torch_inputs(config, 3, before, seed=5))
    mask = masks("left")
    inputs = torch_inputs(config, 3, TOKENS)
    # The differences are too small for another pair to leave.
    torch.autograd.gradcheck(
        lambda *leaves: attend_one_by_one(manager, state.clone(), 0, *leaves, mask),
        [x.clone().requires_grad_() for x in inputs],
        fast_mode=True,
    )


@pytest.mark.parametrize("call", [attend_one_by_one, attend_from_empty])
def test_gradients_reach_the_maps(call):
    config = configured(lc.TOVA())
    maps = random_maps(config)
    for tensor in maps[0].tensors.values():
        tensor.requires_grad_()
    manager = lc.CacheManager(config, maps)
    inputs = torch_inputs(config, 2, TOKENS)
    if call is attend_one_by_one:
        out = call(manager, manager.init(2), 0, *inputs)
    else:
        out = call(config.layer(0), maps[0], *inputs)
    out.square().sum().backward()
    for name, tensor in maps[0].tensors.items():
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("call", ["step", "learn", "empty"])
def test_padding_may_hold_anything(call):
    config = configured(lc.H2O())
    manager = lc.CacheManager(config, random_maps(config))
    mask = masks("left")

    def outputs(filler):
        inputs = [
            x.masked_fill(~mask[:, None, :, None], filler).requires_grad_(call == "learn")
            for x in torch_inputs(config, 3, TOKENS)
        ]
        if call == "empty":
            return attend_from_empty(config.layer(0), manager.maps[0], *inputs, mask), inputs
        return attend_one_by_one(manager, manager.init(3), 0, *inputs, mask), inputs

    (wanted, _), (found, inputs) = outputs(0.0), outputs(float("nan"))
    assert torch.equal(found, wanted)
    if call == "learn":
        found.sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)


def test_logits_below_what_float32_can_lift():
    # The first query sees one pair at a logit of -200, and nothing has been evicted.
    config = configured(lc.SinkWindow(sinks=0), dtype="float32", scale=1.0)
    manager = lc.CacheManager(config, random_maps(config))
    q, k, v = (x.clone() for x in torch_inputs(config, 1, TOKENS))
    q[:, :, 0], k[:, :, 0] = 10.0, -5.0
    wanted = token_by_token(manager, manager.init(1), (q, k, v), None)
    found = attend_from_empty(config.layer(0), manager.maps[0], q, k, v)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype):
    config = configured(lc.H2O(), dtype=dtype)
    manager = lc.CacheManager(config, random_maps(config))
    inputs = torch_inputs(config, 2, TOKENS)
    wanted = token_by_token(manager, manager.init(2), inputs, None)
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = attend_one_by_one(manager, manager.init(2), 0, *leaves)
    assert found.dtype == wanted.dtype
    # Both sum in float32 and round once.
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)


def test_a_call_that_fails_midway_changes_nothing():
    class Failing(lc.Policy):
        vectorised = True
        steps = 0

        def update(self, xp, scores, history, probabilities, visible):
            Failing.steps += 1
            if Failing.steps == 5:
                raise KeyError("no more")
            return scores, history

    config = configured(Failing(), capacity=7)
    manager = lc.CacheManager(config, random_maps(config))
    state = manager.init(2)
    before = bits_of(state)
    inputs = torch_inputs(config, 2, TOKENS)
    with pytest.raises(KeyError, match="no more"):
        attend_one_by_one(manager, state, 0, *inputs)
    assert bits_of(state) == before
    with pytest.raises(ValueError, match=r"^k: got shape"):
        attend_one_by_one(manager, state, 0, inputs[0], inputs[1][:, :1], inputs[2])


def test_a_full_cache_without_room():
    config = configured(lc.FullCache(), capacity=10)
    manager = lc.CacheManager(config, random_maps(config))
    inputs = torch_inputs(config, 2, TOKENS)
    with pytest.raises(ValueError, match="capacity = 10"):
        attend_one_by_one(manager, manager.init(2), 0, *inputs)
    with pytest.raises(ValueError, match="capacity = 10"):
        attend_from_empty(config.layer(0), manager.maps[0], *inputs)
