# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: RET505 (Triton compiles these forms, and not their short ones)
"""Where rows, heads and slots lie in the arrays; the only loads and stores of stored pairs.

A row's slots lie flat, one head's after another's, and rows may be any distance apart: an engine
hands out pages. Rows are counted in 64 bits, what lies within one in 32: half the registers.

Pairs are numbers, or codes and scales where CODES is no empty text (see `planes`).
"""

import triton
import triton.language as tl

from .codes import centred, scale_of, store_codes
from .planes import pair_numbers


@triton.jit
def head_slots(heads, kv_head, capacity):
    """A KV head's first slot in a row, 64 bits, and how many it has.

    `heads` [Hkv, 3] int32 has of each head: first slot, slots, recent tokens that stay. None: all
    heads have `capacity` slots.
    """
    if heads is None:
        return kv_head.to(tl.int64) * capacity, capacity
    else:
        at = heads + kv_head * 3
        return tl.load(at).to(tl.int64), tl.load(at + 1)


@triton.jit
def recent_of(heads, kv_head, recent):
    """How many recent tokens a KV head never evicts; `recent` where all heads are alike."""
    if heads is None:
        return recent
    else:
        return tl.load(heads + kv_head * 3 + 2)


@triton.jit
def row_of(rows, sequence):
    """Which row of the arrays is sequence `sequence` of the call: 64 bits. None: the same."""
    if rows is None:
        return sequence.to(tl.int64)
    else:
        return tl.load(rows + sequence).to(tl.int64)


@triton.jit
def row_start(array, row, stride, ALIGNED: tl.constexpr):
    """Where a row begins. `stride` counts 16 bytes if rows are `ALIGNED` to them, else numbers.

    Whole vectors are loaded only where the compiler sees that they are aligned, and of a stride
    that it does not know it sees nothing.
    """
    if ALIGNED:
        return array + row * stride * (128 // array.dtype.element_ty.primitive_bitwidth)
    else:
        return array + row * stride


@triton.jit
def load_pairs(
    stored, slots, wanted, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TYPE: tl.constexpr
):
    """Keys or values [BLOCK_C, BLOCK_D] that are stored as they are; `stored` as a head's first.

    In the type of computing; zeros where `wanted` is false. That must not depend on what else is
    loaded in the same turn of a loop, or no turn's loads start before the last turn has ended.
    """
    d = tl.arange(0, BLOCK_D)
    offsets = slots[:, None] * HEAD_DIM + d[None, :]
    wanted = wanted[:, None]
    if HEAD_DIM != BLOCK_D:
        wanted = wanted & (d[None, :] < HEAD_DIM)
    return tl.load(stored + offsets, mask=wanted, other=0.0).to(TYPE)


@triton.jit
def load_pair_of_each(
    starts,
    scales,
    slots,
    held,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Key or value [BLOCK_B, BLOCK_D] of one slot in each of several heads.

    `starts` and `scales` [BLOCK_B] point at the heads' first.
    """
    d = tl.arange(0, BLOCK_D)
    at = (starts + slots * pair_numbers(CODES, HEAD_DIM))[:, None]
    if CODES == "":
        wanted = held[:, None] & (d[None, :] < HEAD_DIM)
        return tl.load(at + d[None, :], mask=wanted, other=0.0).to(TYPE)
    else:
        scale = tl.load(scales + slots, mask=held, other=0.0).to(tl.float32)
        return (centred(at, held[:, None], d[None, :], CODES) * scale[:, None]).to(TYPE)


@triton.jit
def load_pair(
    stored,
    scales,
    slot,
    held,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The same [BLOCK_D] of one slot of one head."""
    d = tl.arange(0, BLOCK_D)
    at = stored + slot * pair_numbers(CODES, HEAD_DIM)
    if CODES == "":
        return tl.load(at + d, mask=(d < HEAD_DIM) & held, other=0.0).to(TYPE)
    else:
        scale = tl.load(scales + slot, mask=held, other=0.0).to(tl.float32)
        return (centred(at, held, d, CODES) * scale).to(TYPE)


@triton.jit
def store_pair(
    stored,
    scales,
    slot,
    source,
    pair,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Put a key or a value [BLOCK_D], which lies at `source`, into a slot of one head."""
    d = tl.arange(0, BLOCK_D)
    at = stored + slot * pair_numbers(CODES, HEAD_DIM)
    if CODES == "":
        tl.store(at + d, pair.to(stored.dtype.element_ty), mask=d < HEAD_DIM)
    else:
        scale = scale_of(pair.to(tl.float32), CODES, BLOCK_D)
        tl.store(scales + slot, scale)
        store_codes(at, source, scale, CODES)
