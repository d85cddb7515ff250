"""States that cannot be, that are another manager's, or that a policy raises in the midst of."""

import contextlib
import functools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from tests.helpers import (
    POLICIES,
    assert_same_state,
    held_by,
    policy_id,
    random_inputs,
    random_maps,
    small_config,
)

from .arrays import ODDITIES, REFUSED
from .rule import Refusal, bits, outcome, refused, state_bits

CONFIG = small_config(dtype="float64")
MAPS = random_maps(CONFIG)
MANAGER = lc.CacheManager(CONFIG, MAPS)
DEVICES = (
    *("banana", "", "cpu:9", "cpu:-1", "cuda:77", "mps:3", "xpu", "hpu", "vulkan", "numpy"),
    *(-1, 3.5, True, [], torch.float32, torch.device("xpu")),
)


def inputs(config, batch, tokens, seed):
    arrays = random_inputs(config, batch, tokens, np.random.default_rng(seed))
    return [torch.as_tensor(array).to(getattr(torch, config.dtype)) for array in arrays]


def used(manager=MANAGER, batch=3, tokens=9):
    state = manager.init(batch)
    for layer in range(manager.config.num_layers):
        manager.attend(state, layer, *inputs(state.config, batch, tokens, layer))
    return state


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_devices_that_are_none(device):
    state = used()
    layer = CONFIG.layer(0)
    refused(lambda: MANAGER.init(1, device=device), "device")
    refused(lambda: state.to(device), "device", unchanged=lambda: state_bits(state))
    refused(lambda: lc.empty_arrays(layer, 1, device=device), "device")
    refused(lambda: MAPS.to(device), "device")
    if device != "numpy":
        refused(lambda: lc.plan_step(layer, MAPS[0], device=device), "device")


@pytest.mark.parametrize("size", [10**9, 10**12, 2**63, 2**70, -1])
def test_sizes_beyond_memory(size):
    state = used()
    refused(lambda: MANAGER.init(size), "batch_size")
    refused(lambda: MANAGER.init(size, dtype=np.float32), "batch_size")
    refused(lambda: MANAGER.init(max(size, 2**40), device="meta"), "batch_size")
    refused(lambda: lc.empty_arrays(CONFIG.layer(0), size), "rows")
    refused(lambda: state.repeat(size), "count", unchanged=lambda: state_bits(state))
    refused(lambda: lc.FeatureMaps.initialise(CONFIG, hidden=size), "hidden")
    config = functools.partial(small_config, rank=0)
    for name in ("num_layers", "kv_heads", "query_heads"):
        refused(lambda name=name: config(**{name: size}), name)


@given(odd=st.sampled_from(ODDITIES), method=st.sampled_from(["reorder", "select"]))
def test_rows_are_numbers_of_rows(odd, method):
    state = used(batch=2)
    call = getattr(state, method)
    found = outcome(lambda: call(odd), "rows", unchanged=lambda: state_bits(state))
    if not isinstance(found, Refusal):
        assert list(odd) == [0, 1]


@pytest.mark.parametrize("way", [name for name in REFUSED if name not in ("list", "numpy")])
def test_rows_lie_in_memory(way):
    state = used(batch=2)
    for method in (state.reorder, state.select):
        rows = REFUSED[way](torch.tensor([1, 0]))
        if way in ("longer", "another-batch") and method == state.select:
            continue
        refused(lambda: method(rows), "rows", unchanged=lambda: state_bits(state))  # noqa: B023


def test_rows_of_any_strides_are_taken():
    for rows in (
        np.arange(2)[::-1],
        torch.arange(2).flip(0),
        np.array([1, 0], np.uint16),
        torch.tensor([1, 0], dtype=torch.uint16),
        range(1, -1, -1),
    ):
        state, wanted = used(batch=2), used(batch=2)
        state.reorder(rows)
        wanted.reorder([1, 0])
        assert state_bits(state) == state_bits(wanted)


OTHERS = {
    "capacity": {"capacity": 7},
    "capacity-by-head": {"capacity": [[6, 7]] * 2},
    "policy": {"policy": lc.TOVA()},
    "recent": {"policy": lc.H2O(recent=1)},
    "rank": {"rank": 3},
    "layers": {"num_layers": 3},
    "heads": {"query_heads": 2},
    "head-dim": {"head_dim": 8},
    "scale": {"scale": 0.1},
    "softcap": {"softcap": 9.0},
    "state-dtype": {"state_dtype": "float32"},
    "maps": {},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_manager_is_refused(changes, backend):
    config = CONFIG.replace(**changes)
    other = lc.CacheManager(config, random_maps(config, seed=1))
    manager = lc.CacheManager(CONFIG, MAPS, backend=backend)
    state = used(other, batch=2)
    call = inputs(CONFIG, 2, 1, 0)
    refused(lambda: manager.attend(state, 0, *call), "state", unchanged=lambda: state_bits(state))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_inference_mode_makes_no_difference(made, backend, tmp_path):
    """A state from init, clone, select, repeat, to, load: all go on outside, where it began."""
    manager = lc.CacheManager(CONFIG, MAPS, backend=backend)
    mode = torch.inference_mode if made else contextlib.nullcontext
    with mode():
        first = manager.init(2)
        manager.attend(first, 0, *inputs(CONFIG, 2, 9, 0))
        first.save(tmp_path / "state")
        states = [first, first.clone(), first.select([0, 1]), first.repeat(1), first.to("cpu")]
        states.append(manager.load(tmp_path / "state"))
    wanted = None
    for state in states:
        manager.attend(state, 0, *inputs(CONFIG, 2, 1, 1))
        manager.attend(state, 0, *inputs(CONFIG, 2, 4, 2))
        wanted = wanted or state_bits(state)
        assert state_bits(state) == wanted
        state.reorder([1, 0])
        state.reset()


def test_a_pool_made_under_inference_mode_is_refused_outside():
    layer = CONFIG.layer(0)
    plan = lc.plan_step(layer, MAPS[0])
    page = CONFIG.page(0)
    with torch.inference_mode():
        own, buffer = lc.empty_arrays(layer, 2), torch.zeros(2, page.nbytes, dtype=torch.int8)
        foreign = page.arrays(buffer)
    q, k, v = inputs(CONFIG, 2, 1, 0)
    lengths = torch.zeros(2, dtype=torch.int32)
    lc.step(plan, own, q, k, v, lengths=lengths)
    refused(lambda: lc.step(plan, foreign, q, k, v, lengths=lengths), "arrays.keys")
    with torch.inference_mode():
        lc.step(plan, foreign, q, k, v, lengths=lengths)


class Raising(lc.Policy):
    """Adds up probabilities, and raises when it is asked for the n-th time."""

    vectorised = True
    left = 0

    def update(self, xp, scores, history, probabilities, visible):
        type(self).left -= 1
        if type(self).left == 0:
            raise RuntimeError("as the test wants it")
        return scores + xp.sum(probabilities, axis=(-3, -2)), history


@given(
    backend=st.sampled_from(["torch", "reference"]),
    capacity=st.sampled_from([(6, 6), (4, 7)]),
    tokens=st.sampled_from([1, 3, 12]),
    at=st.integers(1, 5),
    held=st.integers(0, 9),
    pool=st.booleans(),
)
def test_a_policy_that_raises_leaves_everything_as_it_was(
    backend, capacity, tokens, at, held, pool
):
    config = small_config(policy=Raising(), capacity=[list(capacity)] * 2, dtype="float64")
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state = manager.init(2)
    Raising.left = 0
    if held:
        manager.attend(state, 0, *inputs(config, 2, held, 0))
    before = state_bits(state)
    call = inputs(config, 2, tokens, 1)
    Raising.left = at
    try:
        if pool:
            layer = state.layers[0]
            arrays = lc.LayerArrays(**layer.named())
            plan = lc.plan_step(config.layer(0), manager.maps[0], backend=backend)
            lc.step(plan, arrays, *call, lengths=layer.length, rows=torch.tensor([1, 0]))
        else:
            manager.attend(state, 0, *call)
    except RuntimeError as error:
        assert str(error) == "as the test wants it"  # noqa: PT017
        assert state_bits(state) == before


class Reentrant(lc.Policy):
    """Uses the state that it is asked about."""

    vectorised = True
    meddle = staticmethod(lambda: None)

    def update(self, xp, scores, history, probabilities, visible):
        type(self).meddle()
        return scores + xp.sum(probabilities, axis=(-3, -2)), history


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_second_call_meanwhile_is_refused(backend, elsewhere):
    config = small_config(policy=Reentrant())
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state, alone = manager.init(1), manager.init(1)
    call = inputs(config, 1, 5, 0)
    errors = []

    def meddle():
        with contextlib.suppress(IndexError):
            try:
                manager.attend(state, 1, *call)
            except RuntimeError as error:
                errors.append(str(error))

    def from_a_thread():
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()

    manager.attend(alone, 0, *call)
    Reentrant.meddle = staticmethod(from_a_thread if elsewhere else meddle)
    try:
        manager.attend(state, 0, *call)
    finally:
        Reentrant.meddle = staticmethod(lambda: None)
    assert errors
    assert all(error.startswith("state: ") for error in errors)
    assert state_bits(state) == state_bits(alone)


WORDS = st.one_of(
    st.tuples(st.just("attend"), st.integers(1, 9), st.integers(0, 1)),
    st.tuples(st.just("spoilt"), st.sampled_from(sorted(REFUSED)), st.integers(0, 2)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("clone")),
    st.tuples(st.just("inference")),
)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
@given(words=st.lists(WORDS, min_size=3, max_size=9), rank=st.sampled_from([0, 2]))
def test_whatever_is_done_both_backends_agree(policy, words, rank):
    room = 100 if isinstance(policy, lc.FullCache) else [[9, 7]] * 2
    config = small_config(policy=policy, rank=rank, capacity=room, dtype="float64")
    maps = random_maps(config)
    managers = [lc.CacheManager(config, maps, backend=name) for name in ("torch", "reference")]
    states = [manager.init(2) for manager in managers]
    mode = contextlib.nullcontext
    for turn, (word, *arguments) in enumerate(words):
        with mode():
            for i, manager in enumerate(managers):
                state = states[i]
                if word == "attend":
                    tokens, layer = arguments
                    manager.attend(state, layer, *inputs(config, 2, tokens, turn))
                elif word == "spoilt":
                    way, place = arguments
                    call = inputs(config, 2, 1, turn)
                    call[place] = REFUSED[way](call[place])
                    refused(
                        lambda m=manager, s=state, c=call: m.attend(s, 0, *c),
                        *("q", "k", "v"),
                        unchanged=lambda s=state: state_bits(s),
                    )
                elif word == "clone":
                    states[i] = state.clone()
                elif word == "reorder":
                    state.reorder(*arguments)
                elif word == "reset":
                    state.reset()
        if word == "inference":
            mode = (
                torch.inference_mode if mode is contextlib.nullcontext else contextlib.nullcontext
            )
        for layer in range(2):
            found = [held_by(state.layers[layer], config.layer(layer)) for state in states]
            assert_same_state(*found, 1e-9)
    assert bits({"length": states[0].length}) == bits({"length": states[1].length})
