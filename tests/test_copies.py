"""States and managers are copied and pickled, and the copies go on by themselves."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

import less_cache as lc
from tests.helpers import POLICIES, bits_of, policy_id, random_maps, small_config, torch_inputs

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def used(policy, *, numpy=False):
    capacity = 60 if isinstance(policy, lc.FullCache) else [6, 7]
    config = small_config(policy=policy, capacity=[capacity, capacity])
    manager = lc.CacheManager(config, random_maps(config))
    state = manager.init(2, dtype=np.float32 if numpy else None)
    for tokens in (9, 1):
        go_on(manager, state, tokens)
    return manager, state


def go_on(manager, state, tokens):
    inputs = torch_inputs(manager.config, 2, tokens, seed=tokens)
    if state.is_numpy:
        inputs = [x.numpy() for x in inputs]
    return [torch.as_tensor(manager.attend(state, layer, *inputs)) for layer in range(2)]


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_copied_state_goes_on_by_itself(policy, copied, numpy):
    manager, state = used(policy, numpy=numpy)
    other, before = copied(state), bits_of(state)
    found = go_on(manager, other, 3)
    assert bits_of(state) == before
    expected = go_on(manager, state, 3)
    assert all(map(torch.equal, found, expected))
    assert bits_of(other) == bits_of(state)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copied_manager_goes_on_with_states_of_the_first(copied):
    manager, state = used(lc.H2O())
    other, alone = copied((manager, state)), copied(manager)
    found = go_on(*other, 3)
    expected = go_on(manager, state.clone(), 3)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, go_on(alone, state, 3), expected))
    assert alone.maps.digest == manager.maps.digest


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_arrays_of_heads_that_differ_are_written_to(copied):
    # A step writes by way of views, which a copy has to make of its own arrays.
    _, state = used(lc.H2O())
    layer = state.config.layer(0)
    arrays = copied(state.layers[0])
    for run in layer.runs:
        arrays.of_run(run).keys[...] = 7.0
    assert (arrays.keys == 7.0).all()
    assert not (state.layers[0].keys == 7.0).any()
