"""A decode step's kernels against the float64 reference, in guarded and poisoned buffers."""

import functools
import math

import pytest
import torch

import less_cache as lc
from less_cache.arrays import EMPTY, empty_arrays
from less_cache.backends import triton as backend
from less_cache.backends.triton import decode, launch, plans, tiles
from less_cache.backends.triton.aot.on_meta import meta_maps, meta_step
from less_cache.backends.triton.launch import recording
from tests.backends.triton.guards import Guards
from tests.backends.triton.oracle import DEVICE, Pair, config

CASES = {
    "usual": (config(), "exp", None, False),
    "paper, groups, odd sizes": (
        config(kv_heads=1, group=3, head_dim=20, capacity=23, rank=5),
        "paper",
        None,
        True,
    ),
    "split": (config(kv_heads=1, group=2, capacity=150, policy=lc.H2O()), "exp", 2, True),
    "split, last part empty": (
        config(kv_heads=1, capacity=140, head_dim=32, policy=lc.Scissorhands(), rank=0),
        "exp",
        3,
        False,
    ),
    "tova, soft cap": (config(policy=lc.TOVA(), softcap=3.0), "paper", None, False),
    "window of 62": (config(policy=lc.Scissorhands(window=62), group=2), "exp", None, True),
    "key norm": (config(policy=lc.KeyNorm(sinks=1, recent=2), rank=1), "paper", None, False),
    "capacity by head": (
        config(kv_heads=4, capacity=[[3, 9, 9, 40]], policy=lc.H2O(), group=2),
        "paper",
        None,
        True,
    ),
    "capacity by head, split": (
        config(kv_heads=3, capacity=[[150, 5, 70]], policy=lc.Scissorhands(window=9)),
        "paper",
        3,
        False,
    ),
    "observation window": (config(policy=lc.ObservationWindow(window=3)), "exp", None, False),
    "sinks": (config(policy=lc.SinkWindow(sinks=2), head_dim=80, rank=17), "exp", None, True),
    "full": (config(policy=lc.FullCache(), capacity=20, rank=0), "exp", None, True),
    "multi-query": (config(kv_heads=1, group=17, policy=lc.DecayedH2O(factor=0.8)), "exp", None, 0),
}


def chosen_first(monkeypatch):
    """Let victims be chosen in a launch of their own, however few the slots are."""
    monkeypatch.setattr(plans, "MOST_SCANNED", 0)
    monkeypatch.setattr(decode, "_PLANS", {})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("apart", [False, True], ids=["", "victims first"])
def test_steps_are_the_references_and_stay_in_their_buffers(name, apart, monkeypatch):
    cache, kind, splits, masked = CASES[name]
    if apart:
        if not cache.rank:
            pytest.skip("without maps there is one launch")
        chosen_first(monkeypatch)
    pair = Pair(cache, batch=2, kind=kind)
    most = max(pair.layer.capacities)
    guards = Guards()
    if most > 20:
        # Full but for a few slots at once; steps go on from there.
        pair.check(pair.inputs(most - 3))
    pair.arrays = guards.arrays(pair.arrays)
    call = functools.partial(decode.step, splits=splits)
    monkeypatch.setattr(torch, "empty", guards.empty)
    for _ in range(6 if most > 20 else 11):
        arrays = [guards.copy(array) for array in pair.inputs(1)]
        pair.check(arrays, pair.mask(1) if masked else None, call=call)
    guards.check()


@pytest.mark.parametrize(
    ("dtype", "kind", "bound"),
    [
        ("float16", "exp", 1e-2),
        ("bfloat16", "paper", 6e-2),
    ],
)
def test_sixteen_bits(dtype, kind, bound):
    # This policy evicts by numbers that sixteen bits hold exactly, so no set can differ.
    cache = config(policy=lc.SinkWindow(sinks=1), dtype=dtype, group=2)
    pair = Pair(cache, batch=1, kind=kind)
    for _ in range(10):
        pair.check(pair.inputs(1), bound=bound)


def test_what_empty_slots_hold_is_never_seen():
    pair = Pair(config(policy=lc.H2O()), batch=1)
    for array in (pair.arrays.keys, pair.arrays.values):
        array.fill_(float("nan"))
    for _ in range(9):
        # Values there are zeros from the first step on; keys may be anything.
        pair.arrays.keys[pair.arrays.positions == EMPTY] = float("nan")
        pair.check(pair.inputs(1))


def test_a_victim_that_is_no_number_spoils_nothing_more():
    pair = Pair(config(policy=lc.SinkWindow(sinks=0), rank=0, capacity=5), batch=2)
    for _ in range(5):
        pair.check(pair.inputs(1))
    oldest = pair.arrays.positions == 0
    pair.arrays.values[oldest] = float("nan")
    pair.arrays.keys[oldest] = float("inf")
    for _ in range(2):
        pair.check(pair.inputs(1))


def test_offsets_are_64_bits_wide():
    # Rows of q lie 2**31 numbers apart; nearly all of the buffer is never touched.
    pair = Pair(config(dtype="float16", policy=lc.SinkWindow(), kv_heads=1, rank=1), batch=2)
    q, k, v = pair.inputs(1)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    apart = far.as_strided(q.shape, (2**31, 16, 16, 1))
    pair.check([apart.copy_(q), k, v], bound=1e-2)


@pytest.mark.parametrize(("batch", "launches"), [(64, 2), (1, 3)])
def test_a_step_is_two_launches_or_three_and_looks_at_no_data(batch, launches, monkeypatch):
    # Tensors without data would raise at anything that waits for the device.
    monkeypatch.setattr(launch, "INTERPRETED", False)
    layer = config(kv_heads=8, head_dim=128, capacity=2048, rank=0, dtype="float16").layer(0)
    arrays = empty_arrays(layer, 100, device="meta")
    q = torch.empty(batch, 8, 1, 128, dtype=torch.float16, device="meta")
    numbers = torch.empty(batch, dtype=torch.int32, device="meta")
    mask = torch.empty(batch, 1, dtype=torch.bool, device="meta")
    with recording() as recorded:
        backend.attend(layer, arrays, None, q, q, q, lengths=numbers, rows=numbers, mask=mask)
    expected = [plans.select_and_map, plans.attend, plans.conclude_split]
    assert [wanted.kernel for wanted in recorded] == expected[:launches]


@pytest.mark.parametrize(("capacity", "launches"), [(512, 1), (513, 2)])
def test_victims_among_many_slots_are_chosen_first(capacity, launches):
    cache = config(kv_heads=2, group=2, head_dim=64, capacity=[[40, capacity]], dtype="float16")
    layer = cache.layer(0)
    with recording() as recorded:
        meta_step(layer, 20, meta_maps(layer, "exp", 32), masked=False)
    first = [one for one in recorded if one.kernel is plans.select_and_map]
    assert len(first) == launches
    # One sequence a program where it only chooses; where it maps, 32 share the maps' weights.
    assert [one.grid for one in first] == [(2, 20), (2 + 4, 1)][-launches:]
    assert first[-1].constants["SELECTS"] == (launches == 1)


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("capacity", [16, 100, 205, 819, 8192])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_splits_cover_every_slot_and_none_is_idle(processors, capacity, batch):
    layer = config(kv_heads=8, head_dim=128, capacity=capacity, dtype="float16").layer(0)
    tile = tiles.tiles(layer, batch, processors)
    # As the kernel counts.
    span = math.ceil(math.ceil(capacity / tile.slots) / tile.splits) * tile.slots
    assert (tile.splits - 1) * span < capacity <= tile.splits * span
    programs = tiles.PROGRAMS_A_PROCESSOR * processors
    assert tile.splits == 1 or tile.splits * batch * 8 <= programs
    if batch == 1 and capacity == 8192 and processors > 1:
        # 256 tiles: no fewer programs than what is merged at the end allows.
        assert tile.splits == tiles.MOST_SPLITS


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_a_captured_step_replays():
    pair = Pair(config(), batch=2)
    inputs = pair.inputs(1)
    lengths = torch.zeros_like(pair.lengths)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode.step(pair.layer, pair.arrays, pair.maps, *inputs, lengths=lengths)
    torch.cuda.synchronize()
    pair = Pair(config(), batch=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.step(pair.layer, pair.arrays, pair.maps, *inputs, lengths=lengths)

    def replay(layer, arrays, maps, q, k, v, **given):
        for static, new in zip((*inputs, lengths), (q, k, v, given["lengths"]), strict=True):
            static.copy_(new)
        graph.replay()
        return out

    for _ in range(12):
        pair.check(pair.inputs(1), call=replay)
