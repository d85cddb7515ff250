# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: RET505 (Triton compiles these forms, and not their short ones)
"""The end of a decode step for one head: merge the victim, insert the new pair, output, scores."""

import triton
import triton.language as tl

from .maths import (
    FAIR_SHARE,
    GAIN_HISTORY,
    GAIN_NONE,
    GAIN_SUM,
    INFINITY,
    bound,
    capped,
    initial_score,
    popcount,
)
from .planes import pair_numbers
from .slots import load_pair, row_start, store_pair


@triton.jit
def low_rank(phi, H, SINGLE: tl.constexpr):
    """φ H: [BLOCK_G, BLOCK_R] by [BLOCK_R, BLOCK_D], without a matrix product where G is 1."""
    if SINGLE:
        # Row 0 is the only one that counts; the others may repeat it.
        row = tl.sum(tl.where(tl.arange(0, phi.shape[0])[:, None] == 0, phi, 0.0), 0)
        return tl.sum(row[:, None] * H, 0)[None, :] + tl.zeros([phi.shape[0], 1], tl.float32)
    else:
        return tl.dot(phi, H, input_precision="tf32x3")


@triton.jit
def merge(
    values,
    value_scales,
    position,
    H,
    z,
    psi,
    slot,
    seen,
    VALUE_CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """H += ψ(victim)ᵀ v and z += ψ(victim), if the slot holds one; returns both.

    `position` is the slot's; the pointers are at this head's first numbers.
    """
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    begun = seen > 0
    evicted = (position != -1) & begun
    feature = tl.load(psi + r, mask=(r < RANK) & evicted, other=0.0)
    value = load_pair(
        values, value_scales, slot, evicted, VALUE_CODES, HEAD_DIM, BLOCK_D, tl.float32
    )
    real = r < RANK
    cells = r[:, None] * HEAD_DIM + d[None, :]
    inside = real[:, None] & (d[None, :] < HEAD_DIM)
    # Before the first token both are empty, whatever they hold.
    summed_H = tl.load(H + cells, mask=inside & begun, other=0.0)
    summed_z = tl.load(z + r, mask=real & begun, other=0.0)
    new_H = summed_H + feature[:, None] * value[None, :]
    new_z = summed_z + feature
    # Several threads may have read what one of them is about to write.
    tl.debug_barrier()
    tl.store(H + cells, new_H, mask=inside)
    tl.store(z + r, new_z, mask=real)
    return new_H, new_z


@triton.jit
def update_scores(
    logits,
    scores,
    positions,
    history,
    slot,
    seen,
    capacity,
    peak,
    mass,
    new,
    start_score,
    GAIN: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """With p = exp(s - m) / mass: score = λ score + Σ_g p, or a bit where mean_g p >= 1 / n.

    `new` [BLOCK_G] are the new pair's logits, `start_score` is its score before this query; n are
    the pairs now held. The pointers are at this head's first numbers.
    """
    g = tl.arange(0, BLOCK_G)
    newest = (tl.full([], 1, tl.int64) << WINDOW) - 1
    held = tl.minimum(seen + 1, capacity)
    for start in tl.range(0, bound(capacity), BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        inside = slots < capacity
        fresh = slots == slot
        # What a sequence without tokens finds in its row means nothing.
        old_pairs = inside & (slots != slot) & (seen > 0)
        total = tl.zeros([BLOCK_S], tl.float32)
        for i in tl.range(0, GROUP):
            s = tl.load(logits + i * capacity + slots, mask=old_pairs, other=-INFINITY)
            here = g == i
            own = tl.sum(tl.where(here, new, 0.0), 0)
            top = tl.sum(tl.where(here, peak, 0.0), 0)
            sum_i = tl.sum(tl.where(here, mass, 0.0), 0)
            total += tl.exp(tl.where(fresh, own, s) - top) / sum_i
        if GAIN == GAIN_SUM:
            old = tl.load(scores + slots, mask=old_pairs, other=0.0)
            earned = DECAY * tl.where(fresh, start_score, old) + total
            # Several threads may read what one of them is about to write.
            tl.debug_barrier()
        else:
            old = tl.load(history + slots, mask=old_pairs, other=0)
            position = tl.load(positions + slots, mask=old_pairs, other=-1).to(tl.int32)
            persistent = (total / GROUP * held >= FAIR_SHARE) & ((position != -1) | fresh)
            bits = ((old << 1) | persistent.to(tl.int64)) & newest
            earned = popcount(bits).to(tl.float32)
            tl.debug_barrier()
            tl.store(history + slots, bits, mask=inside)
        tl.store(scores + slots, earned, mask=inside)


@triton.jit
def forget(
    values,
    scores,
    positions,
    slot,
    capacity,
    VALUE_CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """All slots of a head but `slot` become empty; the pointers are at its first numbers.

    Their values become 0: later steps read them with a weight of 0, which must make nothing of
    them. Codes are numbers whatever they are.
    """
    if VALUE_CODES == "":
        d = tl.arange(0, BLOCK_D)
        nothing = tl.zeros([BLOCK_D], tl.float32).to(values.dtype.element_ty)
        for other in tl.range(0, bound(capacity)):
            tl.store(values + other * HEAD_DIM + d, nothing, mask=(d < HEAD_DIM) & (other != slot))
    for start in tl.range(0, bound(capacity), BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        others = (slots < capacity) & (slots != slot)
        empty = tl.full([BLOCK_S], -1, tl.int32).to(positions.dtype.element_ty)
        tl.store(positions + slots, empty, mask=others)
        if scores is not None:
            tl.store(scores + slots, tl.zeros([BLOCK_S], tl.float32), mask=others)


@triton.jit
def conclude(
    queries,
    k,
    v,
    keys,
    values,
    key_scales,
    value_scales,
    scores,
    positions,
    history,
    H,
    z,
    phi,
    psi,
    shift,
    logits,
    out,
    sequence,
    row,
    kv_head,
    first,
    capacity,
    slot,
    seen,
    peak,
    mass,
    numerator,
    keys_row_stride,
    values_row_stride,
    key_scales_row_stride,
    value_scales_row_stride,
    scores_row_stride,
    positions_row_stride,
    history_row_stride,
    H_row_stride,
    z_row_stride,
    logits_row_stride,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    START: tl.constexpr,
    GAIN: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the new pair and the low-rank state to the sums over the slots; write everything back.

    With m the maximum that also covers log φz::

        out = (numerator + exp(s_new) v_new + φH) / (mass + exp(s_new) + φz),  all times exp(-m)

    `k`, `v` point at the new pair; queries [BLOCK_G, BLOCK_D] float32; (peak, mass, numerator) as
    from `over_slots`; `first` is the head's first slot in its row. `shift` [B, Hq] is what each
    query's products with keys lack, all alike: it tells against the low-rank state alone. Nothing
    else of this head runs at the same time, so what is read here is old.
    """
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    r = tl.arange(0, BLOCK_R)
    real = d < HEAD_DIM
    # While it is entering its slot, a pair is read as it came, not as it is stored.
    new_key = tl.load(k + d, mask=real, other=0.0)
    new_value = tl.load(v + d, mask=real, other=0.0)
    wide_key = new_key.to(tl.float32)

    new = capped(tl.sum(queries * wide_key[None, :], 1) * SCALE, SOFTCAP)
    top = tl.maximum(peak, new)
    fade = tl.exp(peak - top)
    gain = tl.exp(new - top)
    mass = mass * fade + gain
    numerator = numerator * fade[:, None] + gain[:, None] * new_value.to(tl.float32)[None, :]

    keys = row_start(keys, row, keys_row_stride, ALIGNED)
    keys += first * pair_numbers(KEY_CODES, HEAD_DIM)
    values = row_start(values, row, values_row_stride, ALIGNED)
    values += first * pair_numbers(VALUE_CODES, HEAD_DIM)
    if key_scales is not None:
        key_scales += row * key_scales_row_stride + first
        value_scales += row * value_scales_row_stride + first
    if scores is not None:
        scores += row * scores_row_stride + first
    positions += row * positions_row_stride + first
    head = sequence * KV_HEADS + kv_head
    query_heads = head * GROUP + g
    if phi is not None:
        new_H, new_z = merge(
            values,
            value_scales,
            tl.load(positions + slot).to(tl.int32),
            row_start(H, row, H_row_stride, ALIGNED) + kv_head * RANK * HEAD_DIM,
            z + row * z_row_stride + kv_head * RANK,
            psi + head * RANK,
            slot,
            seen,
            VALUE_CODES,
            HEAD_DIM,
            RANK,
            BLOCK_D,
            BLOCK_R,
        )
        features = tl.load(
            phi + query_heads[:, None] * RANK + r[None, :],
            mask=(g[:, None] < GROUP) & (r[None, :] < RANK),
            other=0.0,
        )
        low_mass = tl.sum(features * new_z[None, :], 1)
        # An empty state has no logarithm, and adds nothing.
        safe = tl.where(low_mass > 0, low_mass, 1.0)
        log_mass = tl.where(low_mass > 0, tl.log(safe), -INFINITY)
        if shift is not None:
            log_mass -= SCALE * tl.load(shift + query_heads, mask=g < GROUP, other=0.0)
        over = tl.maximum(top, log_mass)
        shrink = tl.exp(top - over)
        lift = tl.exp(log_mass - over)
        mean = low_rank(features, new_H, SINGLE) / safe[:, None]
        output = numerator * shrink[:, None] + mean * lift[:, None]
        output = output / (mass * shrink + lift)[:, None]
    else:
        output = numerator / mass[:, None]
    tl.store(
        out + query_heads[:, None] * HEAD_DIM + d[None, :],
        output.to(out.dtype.element_ty),
        mask=(g[:, None] < GROUP) & real[None, :],
    )

    # Every thread has read the victim, and written its logits, before anything is replaced.
    tl.debug_barrier()
    store_pair(keys, key_scales, slot, k, new_key, KEY_CODES, HEAD_DIM, BLOCK_D)
    store_pair(values, value_scales, slot, v, new_value, VALUE_CODES, HEAD_DIM, BLOCK_D)
    start_score = initial_score(seen, wide_key, START)
    if GAIN == GAIN_NONE:
        # Where positions tell them, coded pairs have none.
        if scores is not None:
            tl.store(scores + slot, start_score)
    else:
        if GAIN == GAIN_HISTORY:
            history += row * history_row_stride + first
        update_scores(
            logits + sequence * logits_row_stride + first * GROUP,
            scores,
            positions,
            history,
            slot,
            seen,
            capacity,
            top,
            mass,
            new,
            start_score,
            GAIN,
            DECAY,
            WINDOW,
            GROUP,
            BLOCK_G,
            BLOCK_S,
        )
    tl.store(positions + slot, seen.to(positions.dtype.element_ty))
    if seen == 0:
        forget(
            values,
            scores,
            positions,
            slot,
            capacity,
            VALUE_CODES,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_S,
        )
