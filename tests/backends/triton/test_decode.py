"""A decode step's kernels against the float64 reference, in guarded and poisoned buffers."""

import pytest
import torch

import less_cache as lc
from less_cache.backends import triton as backend
from less_cache.backends.triton import decode, launch
from less_cache.backends.triton.launch import recording
from less_cache.state import allocate
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
    "sinks": (config(policy=lc.SinkWindow(sinks=2), head_dim=80, rank=17), "exp", None, True),
    "full": (config(policy=lc.FullCache(), capacity=20, rank=0), "exp", None, True),
    "multi-query": (config(kv_heads=1, group=17, policy=lc.DecayedH2O(factor=0.8)), "exp", None, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_references_and_stay_in_their_buffers(name, monkeypatch):
    cache, kind, splits, masked = CASES[name]
    pair = Pair(cache, batch=2, kind=kind)
    guards = Guards()
    if pair.layer.capacity > 20:
        # Full but for a few slots at once; steps go on from there.
        prompt = pair.inputs(pair.layer.capacity - 3)
        pair.check(backend.append, prompt, None, 5e-5)
    pair.state = guards.state(pair.state)

    def step(layer, state, maps, q, k, v, mask):
        return decode.step(layer, state, maps, q, k, v, mask, splits=splits)

    monkeypatch.setattr(torch, "empty", guards.empty)
    for _ in range(6 if pair.layer.capacity > 20 else 11):
        arrays = [guards.copy(array) for array in pair.inputs(1)]
        mask = pair.mask(1) if masked else None
        pair.check(step, arrays, mask, 5e-5)
    guards.check()


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "kind", "bound"),
    [
        ("float16", None, "exp", 1e-2),
        ("bfloat16", None, "paper", 6e-2),
        ("float16", "float16", "paper", 2e-2),
        ("float32", "bfloat16", "exp", 4e-2),
    ],
)
def test_sixteen_bits(dtype, state_dtype, kind, bound):
    # This policy evicts by numbers that sixteen bits hold exactly, so no set can differ.
    cache = config(policy=lc.SinkWindow(sinks=1), dtype=dtype, state_dtype=state_dtype, group=2)
    pair = Pair(cache, batch=1, kind=kind)
    for _ in range(10):
        pair.check(decode.step, pair.inputs(1), None, bound)


def test_what_empty_slots_hold_is_never_seen():
    pair = Pair(config(policy=lc.H2O()), batch=1)
    for array in (pair.state.keys, pair.state.values):
        array.fill_(float("nan"))
    pair.state.scores.fill_(float("nan"))
    for _ in range(9):
        pair.check(decode.step, pair.inputs(1), None, 5e-5)


def test_offsets_are_64_bits_wide():
    # Rows of q lie 2**31 numbers apart; nearly all of the buffer is never touched.
    pair = Pair(config(dtype="float16", policy=lc.SinkWindow(), kv_heads=1, rank=1), batch=2)
    q, k, v = pair.inputs(1)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    apart = far.as_strided(q.shape, (2**31, 16, 16, 1))
    pair.check(decode.step, [apart.copy_(q), k, v], None, 1e-2)


@pytest.mark.parametrize(("batch", "launches"), [(64, 2), (1, 3)])
def test_a_step_is_two_launches_or_three_and_looks_at_no_data(batch, launches, monkeypatch):
    # Tensors without data would raise at anything that waits for the device.
    monkeypatch.setattr(launch, "INTERPRETED", False)
    layer = config(kv_heads=8, head_dim=128, capacity=2048, rank=0, dtype="float16").layer(0)
    state = allocate(layer, batch, device="meta")
    q = torch.empty(batch, 8, 1, 128, dtype=torch.float16, device="meta")
    with recording() as recorded:
        decode.step(layer, state, None, q, q, q, None)
    expected = [decode.select_and_map, decode.attend, decode.conclude_split]
    assert [wanted.kernel for wanted in recorded] == expected[:launches]


@pytest.mark.parametrize("processors", [1, 108, 132])
@pytest.mark.parametrize("capacity", [16, 100, 205, 819, 8192])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_splits_cover_every_slot_once(processors, capacity, batch):
    layer = config(kv_heads=8, head_dim=128, capacity=capacity, dtype="float16").layer(0)
    tile = decode.tiles(layer, batch, processors)
    assert (tile.splits - 1) * tile.span < capacity <= tile.splits * tile.span
    assert tile.span % tile.slots == 0
    if batch * 8 >= 2 * processors:
        assert tile.splits == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_a_captured_step_replays():
    pair = Pair(config(), batch=2)
    arrays = pair.inputs(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode.step(pair.layer, pair.state, pair.maps, *arrays, None)
    torch.cuda.synchronize()
    pair = Pair(config(), batch=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.step(pair.layer, pair.state, pair.maps, *arrays, None)

    def replay(layer, state, maps, q, k, v, mask):
        for static, new in zip(arrays, (q, k, v), strict=True):
            static.copy_(new)
        graph.replay()
        return out

    for _ in range(12):
        pair.check(replay, pair.inputs(1), None, 5e-5)
