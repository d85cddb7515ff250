# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM109 (Triton compiles these forms, and not their short ones)
"""Kernel B of a decode step: attention over one head's slots, and what is written back."""

import triton
import triton.language as tl

from .conclude import conclude
from .maths import ATTENTION, HISTORY, INFINITY, capped, gathered


@triton.jit
def over_slots(
    q,
    keys,
    values,
    positions,
    logits,
    head,
    slot,
    first,
    SCORE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums m = max s, Σ exp(s - m), Σ exp(s - m) v over the pairs in SPAN slots from `first`.

    Here s = q·k·scale. The slot that the new pair takes is left out: that pair comes in at the
    end, from registers.
    Where scores need them, the s are left in `logits` [B, Hkv, G, C], -∞ at empty slots.
    Returns m [BLOCK_G], mass [BLOCK_G], numerator [BLOCK_G, BLOCK_D].
    """
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    real = d[None, :] < HEAD_DIM
    peak = tl.full([BLOCK_G], -INFINITY, tl.float32)
    mass = tl.zeros([BLOCK_G], tl.float32)
    numerator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    # 64 bits to the head, 32 within it: half the registers of 64-bit pointers.
    positions += head * CAPACITY
    keys += head * CAPACITY * HEAD_DIM
    values += head * CAPACITY * HEAD_DIM
    for start in tl.range(0, SPAN, BLOCK_C):
        slots = first + start + tl.arange(0, BLOCK_C)
        inside = slots < CAPACITY
        position = tl.load(positions + slots, mask=inside, other=-1)
        held = (position != -1) & (slots != slot)
        offsets = slots[:, None] * HEAD_DIM + d[None, :]
        wanted = held[:, None] & real
        key = tl.load(keys + offsets, mask=wanted, other=0.0).to(DOT)
        value = tl.load(values + offsets, mask=wanted, other=0.0).to(DOT)
        s = capped(tl.dot(q, tl.trans(key), input_precision="ieee") * SCALE, SOFTCAP)
        s = tl.where(held[None, :], s, -INFINITY)
        if SCORE == ATTENTION or SCORE == HISTORY:
            kept = (g[:, None] < GROUP) & inside[None, :]
            at = g[:, None] * CAPACITY + slots[None, :]
            tl.store(logits + head * GROUP * CAPACITY + at, s, mask=kept)
        peak, mass, numerator = gathered(s, value, peak, mass, numerator, DOT)
    return peak, mass, numerator


@triton.jit
def attend(
    q,
    k,
    v,
    mask,
    keys,
    values,
    scores,
    positions,
    history,
    H,
    z,
    length,
    slots,
    seen,
    phi,
    psi,
    logits,
    out,
    part_peak,
    part_mass,
    part_numerator,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    SCORE: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOT: tl.constexpr,
):
    """Kernel B: out = (φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), s = q·k·scale.

    The victim goes into H and z, the new pair into its slot, probabilities into the scores.

    Program (b·Hkv + h, split) reads SPAN slots of one head once, for all its G query heads. Unless
    they are SPLIT among several it also concludes; else it leaves (m, mass, numerator), and
    `conclude_split` does.

    Shapes: q [B, Hq, D], k, v [B, Hkv, D], mask [B] by their strides; slots, seen [B, Hkv];
    phi [B, Hq, R], psi [B, Hkv, R]; logits [B, Hkv, G, C]; out [B, Hq, D];
    part_peak, part_mass [B, Hkv, SPLITS, BLOCK_G], part_numerator [..., BLOCK_D]; the rest as
    `LayerState` has it.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = head // KV_HEADS
    kv_head = head % KV_HEADS
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    query_heads = kv_head * GROUP + g
    real = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    taken = True
    if HAS_MASK:
        taken = tl.load(mask + row * mask_stride) != 0
    if taken:
        at = q + row * q_row_stride + query_heads[:, None] * q_head_stride + d[None, :]
        queries = tl.load(at, mask=real, other=0.0)
        slot = tl.load(slots + head)
        peak, mass, numerator = over_slots(
            queries.to(DOT),
            keys,
            values,
            positions,
            logits,
            head,
            slot,
            split * SPAN,
            SCORE,
            SCALE,
            SOFTCAP,
            GROUP,
            CAPACITY,
            HEAD_DIM,
            SPAN,
            BLOCK_G,
            BLOCK_C,
            BLOCK_D,
            DOT,
        )
        if SPLIT:
            part = (head * tl.num_programs(1) + split) * BLOCK_G + g
            tl.store(part_peak + part, peak)
            tl.store(part_mass + part, mass)
            tl.store(part_numerator + part[:, None] * BLOCK_D + d[None, :], numerator)
        else:
            conclude(
                queries.to(tl.float32),
                k + row * k_row_stride + kv_head * k_head_stride,
                v + row * v_row_stride + kv_head * v_head_stride,
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
                tl.load(seen + head),
                peak,
                mass,
                numerator,
                SCORE,
                DECAY,
                WINDOW,
                SCALE,
                SOFTCAP,
                GROUP,
                SINGLE,
                CAPACITY,
                HEAD_DIM,
                RANK,
                BLOCK_G,
                BLOCK_D,
                BLOCK_R,
                BLOCK_S,
            )
    else:
        if split == 0:
            at = out + (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
            nothing = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            tl.store(at, nothing.to(out.dtype.element_ty), mask=real)


@triton.jit
def conclude_split(
    q,
    k,
    v,
    mask,
    keys,
    values,
    scores,
    positions,
    history,
    H,
    z,
    length,
    slots,
    seen,
    phi,
    psi,
    logits,
    out,
    part_peak,
    part_mass,
    part_numerator,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    mask_stride,
    HAS_MASK: tl.constexpr,
    SCORE: tl.constexpr,
    DECAY: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    SINGLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the parts: m = max mᵢ, mass = Σ exp(mᵢ - m) massᵢ, numerators alike; then conclude.

    Program b·Hkv + h; parameters as in `attend`.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // KV_HEADS
    kv_head = head % KV_HEADS
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    query_heads = kv_head * GROUP + g
    real = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    taken = True
    if HAS_MASK:
        taken = tl.load(mask + row * mask_stride) != 0
    if taken:
        peak = tl.full([BLOCK_G], -INFINITY, tl.float32)
        mass = tl.zeros([BLOCK_G], tl.float32)
        numerator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for split in tl.range(0, SPLITS):
            part = (head * SPLITS + split) * BLOCK_G + g
            part_top = tl.load(part_peak + part)
            top = tl.maximum(peak, part_top)
            finite = tl.where(top == -INFINITY, 0.0, top)
            fade = tl.exp(peak - finite)
            gain = tl.exp(part_top - finite)
            mass = mass * fade + tl.load(part_mass + part) * gain
            gained = tl.load(part_numerator + part[:, None] * BLOCK_D + d[None, :])
            numerator = numerator * fade[:, None] + gained * gain[:, None]
            peak = top
        at = q + row * q_row_stride + query_heads[:, None] * q_head_stride + d[None, :]
        conclude(
            tl.load(at, mask=real, other=0.0).to(tl.float32),
            k + row * k_row_stride + kv_head * k_head_stride,
            v + row * v_row_stride + kv_head * v_head_stride,
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
            tl.load(slots + head),
            tl.load(seen + head),
            peak,
            mass,
            numerator,
            SCORE,
            DECAY,
            WINDOW,
            SCALE,
            SOFTCAP,
            GROUP,
            SINGLE,
            CAPACITY,
            HEAD_DIM,
            RANK,
            BLOCK_G,
            BLOCK_D,
            BLOCK_R,
            BLOCK_S,
        )
