# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: RET505, SIM102, SIM109 (Triton compiles these forms, and not their short ones)
"""The end of a decode step for one head: merge the victim, insert the new pair, output, scores."""

import triton
import triton.language as tl

from .maths import ATTENTION, HISTORY, INFINITY, KEY_NORM, POSITION, capped, popcount


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
    positions,
    H,
    z,
    psi,
    head,
    slot,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """H += ψ(victim)ᵀ v and z += ψ(victim), if the slot holds one; returns both as stored."""
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    pair = head * CAPACITY + slot
    evicted = tl.load(positions + pair) != -1
    feature = tl.load(psi + head * RANK + r, mask=(r < RANK) & evicted, other=0.0)
    value = tl.load(values + pair * HEAD_DIM + d, mask=(d < HEAD_DIM) & evicted, other=0.0)
    ranks = head * RANK + r
    real = r < RANK
    cells = ranks[:, None] * HEAD_DIM + d[None, :]
    inside = real[:, None] & (d[None, :] < HEAD_DIM)
    summed_H = tl.load(H + cells, mask=inside, other=0.0).to(tl.float32)
    summed_z = tl.load(z + ranks, mask=real, other=0.0).to(tl.float32)
    new_H = (summed_H + feature[:, None] * value.to(tl.float32)[None, :]).to(H.dtype.element_ty)
    new_z = (summed_z + feature).to(z.dtype.element_ty)
    # Several threads may have read what one of them is about to write.
    tl.debug_barrier()
    tl.store(H + cells, new_H, mask=inside)
    tl.store(z + ranks, new_z, mask=real)
    return new_H.to(tl.float32), new_z.to(tl.float32)


@triton.jit
def update_scores(
    logits,
    scores,
    positions,
    history,
    head,
    slot,
    held,
    peak,
    mass,
    new,
    SCORE: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """With p = exp(s - m) / mass: score = λ score + Σ_g p, or a bit where mean_g p >= 1 / n.

    `new` [BLOCK_G] are the new pair's logits, `held` is n, the pairs now held.
    """
    g = tl.arange(0, BLOCK_G)
    newest = (tl.full([], 1, tl.int64) << WINDOW) - 1
    for start in tl.range(0, CAPACITY, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        inside = slots < CAPACITY
        fresh = slots == slot
        total = tl.zeros([BLOCK_S], tl.float32)
        for i in tl.range(0, GROUP):
            at = (head * GROUP + i) * CAPACITY + slots
            s = tl.load(logits + at, mask=inside, other=-INFINITY)
            here = g == i
            own = tl.sum(tl.where(here, new, 0.0), 0)
            top = tl.sum(tl.where(here, peak, 0.0), 0)
            sum_i = tl.sum(tl.where(here, mass, 0.0), 0)
            total += tl.exp(tl.where(fresh, own, s) - top) / sum_i
        pairs = head * CAPACITY + slots
        if SCORE == ATTENTION:
            old = tl.load(scores + pairs, mask=inside & (slots != slot), other=0.0)
            earned = DECAY * old + total
        else:
            old = tl.load(history + pairs, mask=inside & (slots != slot), other=0)
            position = tl.load(positions + pairs, mask=inside, other=-1)
            persistent = (total / GROUP * held >= 1.0 - 1e-6) & ((position != -1) | fresh)
            bits = ((old << 1) | persistent.to(tl.int64)) & newest
            tl.store(history + pairs, bits, mask=inside)
            earned = popcount(bits).to(tl.float32)
        tl.debug_barrier()
        tl.store(scores + pairs, earned, mask=inside)


@triton.jit
def conclude(
    queries,
    k,
    v,
    keys,
    values,
    scores,
    positions,
    history,
    H,
    z,
    length,
    phi,
    psi,
    logits,
    out,
    head,
    row,
    kv_head,
    slot,
    seen,
    peak,
    mass,
    numerator,
    SCORE: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the new pair and the low-rank state to the sums over the slots; write everything back.

    With m the maximum that also covers log φz::

        out = (numerator + exp(s_new) v_new + φH) / (mass + exp(s_new) + φz),  all times exp(-m)

    `k`, `v` point at the new pair; queries [BLOCK_G, BLOCK_D] float32; (peak, mass, numerator) as
    from `over_slots`. Nothing else of this head runs at the same time, so what is read here is old.
    """
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    r = tl.arange(0, BLOCK_R)
    real = d < HEAD_DIM
    new_key = tl.load(k + d, mask=real, other=0.0)
    new_value = tl.load(v + d, mask=real, other=0.0)
    wide_key = new_key.to(tl.float32)

    new = capped(tl.sum(queries * wide_key[None, :], 1) * SCALE, SOFTCAP)
    top = tl.maximum(peak, new)
    fade = tl.exp(peak - top)
    gain = tl.exp(new - top)
    mass = mass * fade + gain
    numerator = numerator * fade[:, None] + gain[:, None] * new_value.to(tl.float32)[None, :]

    query_heads = head * GROUP + g
    if phi is not None:
        new_H, new_z = merge(
            values,
            positions,
            H,
            z,
            psi,
            head,
            slot,
            CAPACITY,
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
    pair = head * CAPACITY + slot
    tl.store(keys + pair * HEAD_DIM + d, new_key, mask=real)
    tl.store(values + pair * HEAD_DIM + d, new_value, mask=real)
    if SCORE == ATTENTION or SCORE == HISTORY:
        update_scores(
            logits,
            scores,
            positions,
            history,
            head,
            slot,
            tl.minimum(seen + 1, CAPACITY),
            top,
            mass,
            new,
            SCORE,
            DECAY,
            WINDOW,
            GROUP,
            CAPACITY,
            BLOCK_G,
            BLOCK_S,
        )
    elif SCORE == POSITION:
        tl.store(scores + pair, seen.to(tl.float32))
    elif SCORE == KEY_NORM:
        tl.store(scores + pair, -tl.sqrt(tl.sum(wide_key * wide_key, 0)))
    else:
        tl.store(scores + pair, 0.0)
    tl.store(positions + pair, seen)
    if length is not None:
        if kv_head == 0:
            # Nobody reads the length here: kernel A carried it on in `seen`.
            tl.store(length + row, seen + 1)
