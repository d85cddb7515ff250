"""Bad calls of `CacheManager.attend` and `ops.step`: refused by name, every bit in its place."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from tests.helpers import POLICIES, random_inputs, random_maps, small_config

from .arrays import MASKS, NUMPY_REFUSED, NUMPY_TAKEN, ODDITIES, REFUSED, TAKEN
from .rule import bits, refused, state_bits

EXAMPLES = 8
BATCH = 2
LAYERS = 2


class Drawn(tuple):
    """What an attack begins with, without all of its numbers in Hypothesis's reports."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)

    def __repr__(self):
        shown = {name: tuple(x.shape) for name, x in self[-1].items() if hasattr(x, "shape")}
        return f"<{shown}>"


@functools.cache
def managers(policy, rank, capacity):
    """A manager of each backend."""
    room = 64 if isinstance(policy, lc.FullCache) else list(capacity)
    config = small_config(policy=policy, rank=rank, capacity=[room] * LAYERS, dtype="float64")
    maps = random_maps(config)
    return {
        backend: lc.CacheManager(config, maps, backend=backend)
        for backend in ("torch", "reference")
    }


@st.composite
def situations(draw, backends=("torch", "reference")):
    """A manager, a state in use, and a good call for it."""
    policy = draw(st.sampled_from(POLICIES))
    capacity = draw(st.sampled_from([(6, 6), (9, 7)]))
    found = managers(policy, draw(st.sampled_from([0, 2])), capacity)
    manager = found[draw(st.sampled_from(backends))]
    state = manager.init(BATCH)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    for tokens in draw(st.lists(st.integers(1, 9), max_size=3)):
        for layer in range(LAYERS):
            manager.attend(state, layer, **inputs(manager.config, tokens, rng))
    call = inputs(manager.config, draw(st.sampled_from([1, 2, 5])), rng)
    return Drawn(found, manager, state, {"layer": draw(st.integers(0, LAYERS - 1)), **call})


def inputs(config, tokens, rng):
    arrays = map(torch.as_tensor, random_inputs(config, BATCH, tokens, rng))
    mask = torch.as_tensor(rng.random((BATCH, tokens)) < 0.8)
    return dict(zip(("q", "k", "v", "mask"), (*arrays, mask), strict=True))


@pytest.mark.parametrize("way", REFUSED)
@given(situation=situations(), argument=st.sampled_from(["q", "k", "v", "mask"]))
def test_spoilt_tensors_are_refused(way, situation, argument):
    _, manager, state, call = situation
    if argument == "mask" and way == "none":
        return
    call[argument] = REFUSED[way](call[argument])
    # k says how many tokens there are: where these differ, the others are wrong as well.
    names = ("q", "k", "v") if argument != "mask" else ("mask",)
    refused(lambda: manager.attend(state, **call), *names, unchanged=lambda: state_bits(state))


def test_each_argument_in_each_way_is_refused():
    """The same without chance: no way of spoiling passes in any place."""
    for backend in ("torch", "reference"):
        manager = managers(POLICIES[2], 2, (6, 6))[backend]
        state = manager.init(BATCH)
        for tokens in (1, 4):
            good = inputs(manager.config, tokens, np.random.default_rng(0))
            manager.attend(state, 0, **good)
            for argument in good:
                for way, spoil in REFUSED.items():
                    if argument == "mask" and way == "none":
                        continue
                    call = {**good, argument: spoil(good[argument])}
                    refused(
                        functools.partial(manager.attend, state, 0, **call),
                        *(("mask",) if argument == "mask" else ("q", "k", "v")),
                        unchanged=functools.partial(state_bits, state),
                    )


@given(situation=situations(), data=st.data())
def test_oddities_are_refused(situation, data):
    _, manager, state, call = situation
    argument = data.draw(st.sampled_from(["layer", "q", "k", "v", "mask", "state"]))
    odd = data.draw(st.sampled_from(ODDITIES))
    if (argument == "layer" and type(odd) in (int, np.int64) and 0 <= odd < LAYERS) or (
        argument == "mask" and odd is None
    ):
        return
    refused(
        lambda: manager.attend(**{"state": state, **call, argument: odd}),
        argument,
        unchanged=lambda: state_bits(state),
    )


@pytest.mark.parametrize("way", TAKEN)
@given(situation=situations(), others=st.sets(st.sampled_from(["q", "k", "v"])))
def test_other_forms_of_the_same_numbers_give_the_reference_result(way, situation, others):
    found, manager, state, call = situation
    twin = state.clone()
    wanted = found["reference"].attend(twin, **call)
    changed = {name: TAKEN[way](call[name]) for name in others}
    out = manager.attend(state, **{**call, **changed})
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    assert not out.requires_grad
    assert not any(x.requires_grad for x in state.layers[call["layer"]].arrays().values())


@pytest.mark.parametrize("way", MASKS)
@given(situation=situations())
def test_masks_of_any_kind_mean_the_same(way, situation):
    _, manager, state, call = situation
    twin = state.clone()
    wanted = manager.attend(twin, **call)
    out = manager.attend(state, **{**call, "mask": MASKS[way](call["mask"])})
    assert torch.equal(out, wanted)
    assert state_bits(state) == state_bits(twin)


@given(situation=situations(("reference",)), data=st.data())
def test_numpy_states_refuse_spoilt_arrays_and_take_any_strides(situation, data):
    _, manager, _, call = situation
    state = manager.init(BATCH, dtype=np.float32)
    arrays = {name: call[name].numpy().astype(np.float32) for name in ("q", "k", "v")}
    manager.attend(state, 0, **arrays)
    argument = data.draw(st.sampled_from(["q", "k", "v"]))
    for spoil in NUMPY_REFUSED.values():
        bad = {**arrays, argument: spoil(arrays[argument])}
        refused(
            functools.partial(manager.attend, state, 0, **bad),
            "q",
            "k",
            "v",
            unchanged=lambda: state_bits(state),
        )
    for change in NUMPY_TAKEN.values():
        twin = state.clone()
        wanted = manager.attend(twin, 0, **arrays)
        out = manager.attend(state, 0, **{**arrays, argument: change(arrays[argument])})
        np.testing.assert_array_equal(out, wanted)
        assert state_bits(state) == state_bits(twin)


@functools.cache
def planned(policy, rank):
    config = small_config(policy=policy, rank=rank, capacity=9, num_layers=1, dtype="float64")
    maps = random_maps(config)
    own = None if maps is None else maps[0]
    plans = {
        backend: lc.plan_step(config.layer(0), own, backend=backend)
        for backend in ("torch", "reference")
    }
    return config, plans


@st.composite
def steps(draw):
    """A good call of `ops.step` on a pool of rows, packed or not."""
    policy = draw(st.sampled_from(POLICIES[1:]))
    config, plans = planned(policy, draw(st.sampled_from([0, 2])))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    pool = lc.empty_arrays(config.layer(0), 4)
    tokens = draw(st.sampled_from([1, 3]))
    call = inputs(config, tokens, rng)
    call["lengths"] = torch.zeros(BATCH, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    call["rows"] = torch.as_tensor(rng.permutation(4)[:BATCH])
    if draw(st.booleans()):
        call = {name: x for name, x in call.items() if name != "mask"}
        for name in ("q", "k", "v"):
            call[name] = call[name].transpose(1, 2).flatten(0, 1)
        call["query_start_loc"] = torch.tensor([0, tokens, 2 * tokens])
    return Drawn(plans, pool, call)


@pytest.mark.parametrize("way", REFUSED)
@given(step=steps(), backend=st.sampled_from(["torch", "reference"]), data=st.data())
def test_the_step_refuses_spoilt_tensors(way, step, backend, data):
    plans, pool, call = step
    argument = data.draw(st.sampled_from(sorted(call)))
    if way == "none" and argument in ("mask", "rows", "query_start_loc"):
        return
    spoilt = REFUSED[way](call[argument])
    # Of numbers of sequences, these say how many: then the others are of another length.
    names = tuple(call) if argument in ("lengths", "query_start_loc") else (argument,)
    names = (*names, "q", "k", "v") if argument in ("q", "k", "v") else names
    refused(
        lambda: lc.step(plans[backend], pool, **{**call, argument: spoilt}),
        *names,
        unchanged=lambda: bits(pool.named()),
    )


@pytest.mark.parametrize("way", [name for name in REFUSED if name not in ("number", "text")])
@given(step=steps(), data=st.data())
def test_the_step_refuses_spoilt_pools(way, step, data):
    plans, pool, call = step
    name = data.draw(st.sampled_from(sorted(pool.named())))
    if not getattr(pool, name).numel():
        return
    before = bits(pool.named())
    spoilt = lc.LayerArrays(**{**pool.named(), name: REFUSED[way](getattr(pool, name))})
    names = ("arrays", "rows", "lengths")
    refused(
        lambda: lc.step(plans["torch"], spoilt, **call),
        *names,
        unchanged=lambda: bits(pool.named()) == before,
    )


@given(step=steps(), data=st.data())
def test_the_step_refuses_oddities(step, data):
    plans, pool, call = step
    arguments = ["plan", "arrays", *call, "max_query_len"]
    argument = data.draw(st.sampled_from(arguments))
    odd = data.draw(st.sampled_from(ODDITIES))
    if odd is None and argument in ("mask", "rows", "query_start_loc", "max_query_len"):
        return
    if argument == "max_query_len" and (
        "query_start_loc" not in call or (isinstance(odd, (int, np.integer)) and odd >= 1)
    ):
        return
    call = {"plan": plans["torch"], "arrays": pool, **call, argument: odd}
    names = (argument, "q", "k", "v") if argument in ("q", "k", "v") else (argument, "query")
    refused(lambda: lc.step(**call), *names, unchanged=lambda: bits(pool.named()))
