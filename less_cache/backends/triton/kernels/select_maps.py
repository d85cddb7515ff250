# mypy: disable-error-code="no-untyped-def,untyped-decorator"

"""Kernel A of a decode step: each head's victim, and both feature maps; in one launch or in two."""

import triton
import triton.language as tl

from .maths import (
    GAIN_NONE,
    INFINITY,
    LAST_POSITION,
    NO_MAPS,
    START_KEY_NORM,
    bound,
    last_of_phi,
    last_of_psi,
    two_layers,
)
from .planes import pair_numbers
from .slots import head_slots, load_pair_of_each, recent_of, row_start


@triton.jit
def victims(
    scores,
    positions,
    seen,
    real,
    capacity,
    sinks,
    recent,
    START: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Victims: argmin over a head's slots of (score, position), one for each of BLOCK_B sequences.

    A protected pair counts as +∞, an empty slot as -∞. Protected are positions < sinks and
    positions >= seen - recent. Of a sequence without tokens all slots are empty, whatever they
    hold. Where scores are positions, or all the same, they need not be read.

    `scores`, `positions` [BLOCK_B] point at the heads' first slots; returns slots [BLOCK_B] int32.
    """
    least = tl.full([BLOCK_B], INFINITY, tl.float32)
    oldest = tl.full([BLOCK_B], LAST_POSITION, tl.int32)
    chosen = tl.full([BLOCK_B], 0, tl.int32)
    begun = real & (seen > 0)
    # Told how many turns' loads to keep under way, the compiler does so without a product, too.
    for start in tl.range(0, bound(capacity), BLOCK_C, num_stages=4):
        slots = start + tl.arange(0, BLOCK_C)
        inside = real[:, None] & (slots[None, :] < capacity)
        filled = inside & begun[:, None]
        position = tl.load(positions[:, None] + slots[None, :], mask=filled, other=-1).to(tl.int32)
        kept = (position < sinks) | (position >= seen[:, None] - recent)
        if GAIN == GAIN_NONE and START != START_KEY_NORM:
            score = tl.where(kept, INFINITY, 0.0)
        else:
            score = tl.load(scores[:, None] + slots[None, :], mask=filled, other=0.0)
            score = tl.where(kept, INFINITY, score)
        score = tl.where(position == -1, -INFINITY, score)
        score = tl.where(inside, score, INFINITY)
        position = tl.where(inside, position, LAST_POSITION)
        low = tl.min(score, 1)
        tied = tl.where(score == low[:, None], position, LAST_POSITION)
        old = tl.min(tied, 1)
        first = tl.where(tied == old[:, None], slots[None, :], capacity - 1)
        slot = tl.min(first, 1)
        better = (low < least) | ((low == least) & (old < oldest))
        least = tl.where(better, low, least)
        oldest = tl.where(better, old, oldest)
        chosen = tl.where(better, slot, chosen)
    return chosen


@triton.jit(
    do_not_specialize=[
        "batch",
        "capacity",
        "sinks",
        "recent",
        "keys_row_stride",
        "key_scales_row_stride",
        "scores_row_stride",
        "positions_row_stride",
    ],
    do_not_specialize_on_alignment=["rows", "lengths"],
)
def select_and_map(
    q,
    rows,
    lengths,
    heads,
    keys,
    key_scales,
    scores,
    positions,
    phi_w1,
    phi_w2,
    psi_w1,
    psi_b1,
    psi_w2,
    psi_w3,
    psi_s1,
    psi_s2,
    psi_b,
    slot_out,
    phi_out,
    psi_out,
    batch,
    capacity,
    sinks,
    recent,
    q_row_stride,
    q_head_stride,
    keys_row_stride,
    key_scales_row_stride,
    scores_row_stride,
    positions_row_stride,
    SELECTS: tl.constexpr,
    KEY_CODES: tl.constexpr,
    START: tl.constexpr,
    GAIN: tl.constexpr,
    KIND: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    for the whole tile. Unless it SELECTS, the victims are those that `slot_out` has already.

    Shapes: q [B, Hq, D] by its strides; rows, lengths [B]; heads [Hkv, 3] as `head_slots` has it;
    keys [P, N, D], key_scales, scores, positions [P, N] by the strides of their rows; slot_out
    [B, Hkv]; phi_out [B, Hq, R]; psi_out [B, Hkv, R].
    """
    unit = tl.program_id(0).to(tl.int64)
    sequences = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    real = sequences < batch
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    stored = real[:, None] & (r[None, :] < RANK)
    if unit < KV_HEADS:
        outputs = sequences * KV_HEADS + unit
        seen = tl.load(lengths + sequences, mask=real, other=0).to(tl.int32)
        row = sequences
        if rows is not None:
            row = tl.load(rows + sequences, mask=real, other=0).to(tl.int64)
        first, count = head_slots(heads, unit, capacity)
        if SELECTS:
            held_scores = scores
            if scores is not None:
                held_scores += row * scores_row_stride + first
            slot = victims(
                held_scores,
                positions + row * positions_row_stride + first,
                seen,
                real,
                count,
                sinks,
                recent_of(heads, unit, recent),
                START,
                GAIN,
                BLOCK_B,
                BLOCK_C,
            )
            tl.store(slot_out + outputs, slot, mask=real)
        else:
            slot = tl.load(slot_out + outputs, mask=real, other=0)
        if KIND != NO_MAPS:
            starts = row_start(keys, row, keys_row_stride, ALIGNED)
            # A slot that holds no pair may hold anything: what ψ makes of it is not read.
            scales = key_scales
            if key_scales is not None:
                scales += row * key_scales_row_stride + first
            x = load_pair_of_each(
                starts + first * pair_numbers(KEY_CODES, HEAD_DIM),
                scales,
                slot,
                real & (seen > 0),
                KEY_CODES,
                HEAD_DIM,
                BLOCK_D,
                DOT,
            )
            bias = psi_b1
            if psi_b1 is not None:
                bias += unit * HIDDEN
            features = two_layers(
                x,
                psi_w1 + unit * HEAD_DIM * HIDDEN,
                bias,
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
            tl.store(psi_out + outputs[:, None] * RANK + r[None, :], features, mask=stored)
    else:
        if KIND != NO_MAPS:
            head = unit - KV_HEADS
            at = q + sequences[:, None] * q_row_stride + head * q_head_stride + d[None, :]
            x = tl.load(at, mask=real[:, None] & (d[None, :] < HEAD_DIM), other=0.0).to(DOT)
            features = two_layers(
                x,
                phi_w1 + head * HEAD_DIM * HIDDEN,
                None,
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
            outputs = sequences * QUERY_HEADS + head
            features = last_of_phi(features, KIND)
            tl.store(phi_out + outputs[:, None] * RANK + r[None, :], features, mask=stored)
