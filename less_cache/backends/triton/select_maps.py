# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM109 (Triton compiles these forms, and not their short ones)
"""Kernel A of a decode step: each head's victim, and both feature maps."""

import triton
import triton.language as tl

from .maths import (
    INFINITY,
    LAST_POSITION,
    NO_MAPS,
    NONE,
    POSITION,
    last_of_phi,
    last_of_psi,
    two_layers,
)


@triton.jit
def victims(
    scores,
    positions,
    heads,
    seen,
    real,
    SCORE: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Victims: argmin over slots of (score, position).

    A protected pair counts as +∞, an empty slot as -∞. Protected are positions < SINKS and
    positions >= seen - RECENT. A position's score under the POSITION rule is the position itself,
    so there the scores need not be read.

    `heads` [BLOCK_B] int64 counts heads from the arrays' start; returns slots [BLOCK_B] int32.
    """
    least = tl.full([BLOCK_B], INFINITY, tl.float32)
    oldest = tl.full([BLOCK_B], LAST_POSITION, tl.int32)
    chosen = tl.full([BLOCK_B], 0, tl.int32)
    for start in tl.range(0, CAPACITY, BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C)
        offsets = heads[:, None] * CAPACITY + slots[None, :]
        inside = real[:, None] & (slots[None, :] < CAPACITY)
        position = tl.load(positions + offsets, mask=inside, other=LAST_POSITION)
        kept = (position < SINKS) | (position >= seen[:, None] - RECENT)
        if SCORE == NONE or SCORE == POSITION:
            score = tl.where(kept, INFINITY, 0.0)
        else:
            score = tl.load(scores + offsets, mask=inside, other=0.0)
            score = tl.where(kept, INFINITY, score)
        score = tl.where(position == -1, -INFINITY, score)
        score = tl.where(inside, score, INFINITY)
        low = tl.min(score, 1)
        tied = tl.where(score == low[:, None], position, LAST_POSITION)
        old = tl.min(tied, 1)
        first = tl.where(tied == old[:, None], slots[None, :], CAPACITY - 1)
        slot = tl.min(first, 1)
        better = (low < least) | ((low == least) & (old < oldest))
        least = tl.where(better, low, least)
        oldest = tl.where(better, old, oldest)
        chosen = tl.where(better, slot, chosen)
    return chosen


@triton.jit
def select_and_map(
    q,
    keys,
    scores,
    positions,
    length,
    phi_w1,
    phi_w2,
    psi_w1,
    psi_w2,
    psi_w3,
    psi_s1,
    psi_s2,
    psi_b,
    slot_out,
    seen_out,
    phi_out,
    psi_out,
    batch,
    q_row_stride,
    q_head_stride,
    SCORE: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    KIND: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """Kernel A: slot = victim of each (sequence, KV head); ψ(keys[slot]); φ(q).

    Program (unit, tile) has BLOCK_B sequences. Units below KV_HEADS choose their head's victims
    and map their keys; unit KV_HEADS + i maps query head i. A head's weights are thus read once
    for the whole tile. `seen_out` carries the length on to kernel B, which advances it.

    Shapes: q [B, Hq, D] by its strides; keys [B, Hkv, C, D]; scores, positions [B, Hkv, C];
    length [B]; slot_out, seen_out [B, Hkv]; phi_out [B, Hq, R]; psi_out [B, Hkv, R].
    """
    unit = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    real = rows < batch
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    wanted = real[:, None] & (d[None, :] < HEAD_DIM)
    stored = real[:, None] & (r[None, :] < RANK)
    if unit < KV_HEADS:
        heads = rows * KV_HEADS + unit
        seen = tl.load(length + rows, mask=real, other=0)
        slot = victims(
            scores,
            positions,
            heads,
            seen,
            real,
            SCORE,
            SINKS,
            RECENT,
            CAPACITY,
            BLOCK_B,
            BLOCK_C,
        )
        tl.store(slot_out + heads, slot, mask=real)
        tl.store(seen_out + heads, seen, mask=real)
        if KIND != NO_MAPS:
            pairs = heads * CAPACITY + slot
            x = tl.load(keys + pairs[:, None] * HEAD_DIM + d[None, :], mask=wanted, other=0.0)
            features = two_layers(
                x,
                psi_w1 + unit * HEAD_DIM * HIDDEN,
                psi_w2 + unit * HIDDEN * RANK,
                HEAD_DIM,
                HIDDEN,
                RANK,
                BLOCK_B,
                BLOCK_D,
                BLOCK_H,
                BLOCK_R,
                DOT,
            )
            features = last_of_psi(
                features,
                psi_w3,
                psi_s1,
                psi_s2,
                psi_b,
                unit,
                KIND,
                RANK,
                BLOCK_R,
            )
            tl.store(psi_out + heads[:, None] * RANK + r[None, :], features, mask=stored)
    else:
        if KIND != NO_MAPS:
            head = unit - KV_HEADS
            at = q + rows[:, None] * q_row_stride + head * q_head_stride + d[None, :]
            x = tl.load(at, mask=wanted, other=0.0)
            features = two_layers(
                x,
                phi_w1 + head * HEAD_DIM * HIDDEN,
                phi_w2 + head * HIDDEN * RANK,
                HEAD_DIM,
                HIDDEN,
                RANK,
                BLOCK_B,
                BLOCK_D,
                BLOCK_H,
                BLOCK_R,
                DOT,
            )
            heads = rows * QUERY_HEADS + head
            features = last_of_phi(features, KIND)
            tl.store(phi_out + heads[:, None] * RANK + r[None, :], features, mask=stored)
