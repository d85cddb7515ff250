# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The decode semantics' evictions over a whole known sequence, in one launch."""

import triton
import triton.language as tl

from .maths import (
    FAIR_SHARE,
    GAIN_HISTORY,
    GAIN_NONE,
    GAIN_SUM,
    INFINITY,
    LAST_POSITION,
    START_KEY_NORM,
    bound,
    capped,
    initial_score,
    popcount,
)


@triton.jit
def probabilities(
    q,
    k,
    q_head_stride,
    k_token_stride,
    columns,
    held,
    own,
    fresh,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Σ_g softmax(s_g), s_g = q_g·k·scale over the held pairs, whose keys are k[columns].

    `q` points at the first query head of the group, `k` at the head's first key. Where pairs are
    coded, `own` points at the newest key as it came, which is in the slot `fresh`; else it is None.
    """
    total = tl.zeros([BLOCK_C], tl.float32)
    for member in tl.range(0, GROUP):
        s = tl.zeros([BLOCK_C], tl.float32)
        for start in tl.range(0, HEAD_DIM, CHUNK):
            d = start + tl.arange(0, CHUNK)
            real = d < HEAD_DIM
            query = tl.load(q + member * q_head_stride + d, mask=real, other=0.0)
            at = columns.to(tl.int64)[:, None] * k_token_stride + d[None, :]
            key = tl.load(k + at, mask=held[:, None] & real[None, :], other=0.0)
            s += tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], 1)
        if own is not None:
            all_d = tl.arange(0, BLOCK_D)
            real = all_d < HEAD_DIM
            query = tl.load(q + member * q_head_stride + all_d, mask=real, other=0.0)
            key = tl.load(own + all_d, mask=real, other=0.0)
            s = tl.where(fresh, tl.sum(key.to(tl.float32) * query.to(tl.float32), 0), s)
        s = tl.where(held, capped(s * SCALE, SOFTCAP), -INFINITY)
        weights = tl.exp(s - tl.max(s, 0))
        total += weights / tl.sum(weights, 0)
    return total


@triton.jit(
    do_not_specialize=["begin", "tokens", "capacity", "sinks", "recent", "mask_row_stride"],
    do_not_specialize_on_alignment=["mask"],
)
def scan(
    q,
    k,
    own,
    mask,
    order,
    positions,
    scores,
    history,
    lengths,
    times,
    begin,
    tokens,
    capacity,
    sinks,
    recent,
    q_row_stride,
    q_head_stride,
    q_token_stride,
    k_row_stride,
    k_head_stride,
    k_token_stride,
    mask_row_stride,
    mask_token_stride,
    HAS_MASK: tl.constexpr,
    START: tl.constexpr,
    GAIN: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Notes times[column] = t where token t's step evicts the pair of that column.

    For t from `begin`: victim = argmin over slots of (score, position), -∞ for an empty slot's
    score, +∞ for a protected pair's; the new pair takes its slot; each pair held gets what its
    probability earns. Program b·Hkv + h keeps one head's C slots in registers; keys are read where
    they are: position p is column p, or order[p] where there is padding. Values play no part.

    Shapes: q [B, Hq, S, D], k and own [B, Hkv, S, D], mask [B, S] by their strides; order [B, S];
    positions, scores, history [B, Hkv, C] and lengths [B], the state before token `begin`;
    times [B, Hkv, S], written at what is evicted only.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // KV_HEADS
    kv_head = head % KV_HEADS
    slots = tl.arange(0, BLOCK_C)
    inside = slots < capacity
    at = head * capacity + slots
    position = tl.load(positions + at, mask=inside, other=-1).to(tl.int32)
    position = tl.where(inside, position, LAST_POSITION)
    score = tl.zeros([BLOCK_C], tl.float32)
    if scores is not None:
        score = tl.load(scores + at, mask=inside, other=0.0)
    bits = tl.zeros([BLOCK_C], tl.int64)
    if GAIN == GAIN_HISTORY:
        bits = tl.load(history + at, mask=inside, other=0)
    seen = tl.load(lengths + row)
    first_query = q + row * q_row_stride + kv_head * GROUP * q_head_stride
    first_key = k + row * k_row_stride + kv_head * k_head_stride
    d = tl.arange(0, BLOCK_D)
    for t in tl.range(bound(begin), bound(tokens)):
        token = tl.full([], t, tl.int64)
        taken = True
        if HAS_MASK:
            taken = tl.load(mask + row * mask_row_stride + token * mask_token_stride) != 0
        if taken:
            kept = (position < sinks) | (position >= seen - recent)
            if GAIN == GAIN_NONE and START != START_KEY_NORM:
                rank = tl.where(kept, INFINITY, 0.0)
            else:
                rank = tl.where(kept, INFINITY, score)
            rank = tl.where(position == -1, -INFINITY, rank)
            rank = tl.where(inside, rank, INFINITY)
            tied = tl.where(rank == tl.min(rank, 0), position, LAST_POSITION)
            slot = tl.min(tl.where(tied == tl.min(tied, 0), slots, capacity - 1), 0)
            fresh = slots == slot
            old_position = tl.sum(tl.where(fresh, position, 0), 0)
            evicted = old_position != -1
            old_column = old_position
            if HAS_MASK:
                old_column = tl.load(order + row * tokens + old_position, mask=evicted, other=0)
            tl.store(times + head * tokens + old_column, t, mask=evicted)

            position = tl.where(fresh, seen, position)
            held = inside & (position != -1)
            own_key = own
            if own is not None:
                own_key += row * k_row_stride + kv_head * k_head_stride + token * k_token_stride
            if START == START_KEY_NORM:
                newest = first_key + token * k_token_stride
                if own is not None:
                    newest = own_key
                key = tl.load(newest + d, mask=d < HEAD_DIM, other=0.0)
                score = tl.where(fresh, initial_score(seen, key.to(tl.float32), START), score)
            else:
                score = tl.where(fresh, initial_score(seen, None, START), score)
            if GAIN != GAIN_NONE:
                column = position
                if HAS_MASK:
                    column = tl.load(order + row * tokens + position, mask=held, other=0)
                total = probabilities(
                    first_query + token * q_token_stride,
                    first_key,
                    q_head_stride,
                    k_token_stride,
                    column,
                    held,
                    own_key,
                    fresh,
                    SCALE,
                    SOFTCAP,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_C,
                    BLOCK_D,
                    CHUNK,
                )
                if GAIN == GAIN_SUM:
                    score = DECAY * score + total
                else:
                    count = tl.minimum(seen + 1, capacity)
                    persistent = (total / GROUP * count >= FAIR_SHARE) & held
                    bits = (tl.where(fresh, 0, bits) << 1) | persistent.to(tl.int64)
                    bits = bits & ((1 << WINDOW) - 1)
                    score = popcount(bits).to(tl.float32)
            seen += 1
