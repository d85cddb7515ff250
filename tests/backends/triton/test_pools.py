"""Rows of a pool that an engine owns: in any order, full of anything, in pages, of any length."""

import dataclasses

import pytest
import torch

import less_cache as lc
from less_cache.arrays import empty_arrays
from less_cache.backends import triton as backend
from tests.backends.triton.oracle import DEVICE, Pair, config

POLICIES = (
    lc.H2O(),
    lc.Scissorhands(window=5),
    lc.KeyNorm(recent=1),
    lc.SinkWindow(sinks=1),
    lc.FullCache(),
)
ROWS = 6
RAGGED = [[3, 9, 9, 40]]


def spoil(arrays, rows=slice(None)) -> None:
    """Fill rows with what no array should hold: the bytes of memory that somebody gave back."""
    for name, array in arrays.named().items():
        if array.dtype.is_floating_point:
            array[rows] = float("nan")
        else:
            array[rows] = 3 if name == "positions" else -(2**60)


def pages(layer_config, rows=ROWS):
    """The arrays of a buffer whose rows are further apart than they are long."""
    page = layer_config.page(0)
    buffer = torch.empty(rows, page.nbytes + 48, dtype=torch.int8, device=DEVICE)
    return page.arrays(buffer)


def dense(layer_config, rows=ROWS):
    return empty_arrays(layer_config.layer(0), rows, device=DEVICE)


@pytest.mark.parametrize("make", [dense, pages])
@pytest.mark.parametrize("capacity", [5, RAGGED], ids=["uniform", "by head"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_spoilt_rows_in_any_order_are_the_references(make, capacity, policy):
    full = isinstance(policy, lc.FullCache)
    cache = config(
        policy=policy, kv_heads=4, capacity=8 if full else capacity, rank=0 if full else 2
    )
    arrays = make(cache)
    spoil(arrays)
    rows = torch.tensor([4, 0, 2], dtype=torch.int64, device=DEVICE)
    pair = Pair(cache, 3, "paper", arrays=arrays, rows=rows, length_dtype=torch.int64)
    # The first call of all leaves the third row out: it stays as it is.
    pair.check(pair.inputs(1), torch.tensor([[True], [True], [False]], device=DEVICE))
    assert bool(arrays.keys[2].isnan().all())
    assert bool((arrays.positions[2] == 3).all())
    for _ in range(7):
        pair.check(pair.inputs(1))
    for row in (1, 3, 5):
        assert bool(arrays.keys[row].isnan().all())
        assert bool((arrays.positions[row] == 3).all())


@pytest.mark.parametrize("make", [dense, pages])
@pytest.mark.parametrize("policy", POLICIES[:4], ids=lambda policy: type(policy).__name__)
def test_prompts_into_spoilt_rows_and_steps_after_them(make, policy):
    cache = config(policy=policy, kv_heads=4, capacity=RAGGED, rank=2)
    arrays = make(cache)
    spoil(arrays)
    rows = torch.tensor([5, 1], dtype=torch.int32, device=DEVICE)
    pair = Pair(cache, 2, "paper", arrays=arrays, rows=rows)
    pair.check(pair.inputs(12))
    pair.check(pair.inputs(1))
    pair.check(pair.inputs(3), pair.mask(3))
    pair.check(pair.inputs(1))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("policy", POLICIES[:2], ids=lambda policy: type(policy).__name__)
def test_a_spare_row_named_many_times_harms_no_other(splits, policy):
    cache = config(policy=policy, kv_heads=1, capacity=70, rank=2)
    arrays = dense(cache)
    spoil(arrays)
    pair = Pair(cache, 2, "paper", arrays=arrays, rows=torch.tensor([3, 1], device=DEVICE))
    spare = torch.full((4,), 5, device=DEVICE)

    def padded(layer, given, maps, q, k, v, *, lengths, rows, mask):
        # What is in the padded part is anything, its lengths too.
        q, k, v = (
            torch.cat([x, torch.full_like(x[:1], 7.0).expand(4, -1, -1, -1)]) for x in (q, k, v)
        )
        lengths = torch.cat([lengths, torch.tensor([0, 1, 9, 200], device=DEVICE)])
        out = backend.decode.step(
            layer,
            given,
            maps,
            q,
            k,
            v,
            lengths=lengths,
            rows=torch.cat([rows, spare]),
            splits=splits,
        )
        return out[:2]

    for _ in range(4):
        pair.check(pair.inputs(1), call=padded)
    for row in (0, 2, 4):
        assert bool(arrays.keys[row].isnan().all())


def test_a_row_after_its_first_step_is_a_proper_one():
    cache = config(policy=lc.Scissorhands(window=5), capacity=[[4, 6]])
    arrays = pages(cache)
    spoil(arrays)
    pair = Pair(cache, 1, arrays=arrays, rows=torch.tensor([2], device=DEVICE))
    pair.check(pair.inputs(1))
    assert arrays.positions[2].tolist() == [0, -1, -1, -1, 0, -1, -1, -1, -1, -1]
    assert arrays.scores[2].tolist() == [1.0, 0, 0, 0, 1.0, 0, 0, 0, 0, 0]
    assert arrays.history[2].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    # Values of empty slots are read, and count for nothing.
    assert arrays.values[2].any(1).tolist() == [True, *[False] * 3, True, *[False] * 5]
    assert not bool(arrays.H[2].any())
    assert not bool(arrays.z[2].any())


def test_rows_begin_beyond_32_bits():
    # Nearly all of the buffer is never touched.
    cache = config(dtype="float16", policy=lc.SinkWindow(), kv_heads=1, rank=0)
    arrays = dense(cache, 2)
    apart = 2**31 + 16
    far = torch.empty(apart + arrays.keys[0].numel(), dtype=torch.float16, device=DEVICE)
    keys = far.as_strided(arrays.keys.shape, (apart, 16, 1))
    arrays = dataclasses.replace(arrays, keys=keys)
    pair = Pair(cache, 1, arrays=arrays, rows=torch.tensor([1], device=DEVICE))
    for _ in range(9):
        pair.check(pair.inputs(1), bound=1e-2)


def test_rows_that_are_not_aligned_are_read_all_the_same():
    cache = config(policy=lc.H2O(), kv_heads=1, head_dim=20, capacity=5, rank=3)
    arrays = dense(cache, 3)
    wide = {
        name: torch.empty(3, array[0].numel() + 1, dtype=array.dtype, device=DEVICE)[:, :-1]
        for name, array in arrays.named().items()
    }
    shaped = {n: a.unflatten(1, arrays.named()[n].shape[1:]) for n, a in wide.items()}
    arrays = dataclasses.replace(arrays, **shaped)
    spoil(arrays)
    pair = Pair(cache, 3, arrays=arrays)
    for _ in range(8):
        pair.check(pair.inputs(1))


def test_rows_in_several_pieces_are_refused():
    cache = config(rank=0)
    arrays = dense(cache, 2)
    arrays.scores = torch.zeros(14, 2, device=DEVICE).T
    pair = Pair(cache, 2, arrays=arrays)
    with pytest.raises(ValueError, match=r"scores: has strides \(1, 2\) for shape \(2, 14\)"):
        pair.check(pair.inputs(1))
