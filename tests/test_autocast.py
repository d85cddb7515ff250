"""Autocast rounds what a model computes, and nothing that a cache does."""

from __future__ import annotations

import pytest
import torch

import less_cache as lc
from less_cache import teacher_forced
from tests.helpers import POLICIES, bits_of, policy_id, random_maps, small_config, torch_inputs


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_call_is_the_same_under_autocast(policy, backend):
    capacity = 60 if isinstance(policy, lc.FullCache) else 6
    config = small_config(policy=policy, capacity=capacity, rank=8)
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state, other = manager.init(2), manager.init(2)
    for tokens in (9, 1, 3, 1):
        inputs = torch_inputs(config, 2, tokens, seed=tokens)
        expected = manager.attend(state, 0, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = manager.attend(other, 0, *inputs)
            assert (inputs[0] @ inputs[0].mT).dtype == torch.bfloat16
        assert torch.equal(found, expected)
    assert bits_of(other) == bits_of(state)


def test_the_teacher_forced_form_is_the_same_under_autocast():
    config = small_config()
    layer, maps = config.layer(0), random_maps(config)[0]
    inputs = torch_inputs(config, 2, 20)
    outs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            times = teacher_forced.eviction_times(layer, *inputs[:2])
            outs.append(teacher_forced.attend_all(layer, maps, *inputs, times))
    assert torch.equal(*outs)
