# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Kernel B of a decode step: attention over one head's slots, and what is written back."""

import triton
import triton.language as tl

from .conclude import conclude
from .maths import GAIN_NONE, INFINITY, bound, capped, gathered
from .over_codes import over_codes
from .planes import pair_numbers, stored_channels
from .slots import head_slots, load_pairs, row_of, row_start


@triton.jit
def over_slots(
    q,
    keys,
    values,
    positions,
    logits,
    slot,
    first,
    last,
    capacity,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums m = max s, Σ exp(s - m), Σ exp(s - m) v over the pairs in slots `first` to `last`.

    Here s = q·k·scale. The slot that the new pair takes is left out: that pair comes in at the
    end, from registers.
    Where scores need them, the s are left in `logits` [G, C], -∞ at empty slots. All pointers are
    at their first of this head.
    Returns m [BLOCK_G], mass [BLOCK_G], numerator [BLOCK_G, BLOCK_D].
    """
    g = tl.arange(0, BLOCK_G)
    peak = tl.full([BLOCK_G], -INFINITY, tl.float32)
    mass = tl.zeros([BLOCK_G], tl.float32)
    numerator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in tl.range(bound(first), bound(last), BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C)
        inside = slots < capacity
        position = tl.load(positions + slots, mask=inside, other=-1).to(tl.int32)
        others = inside & (slots != slot)
        held = (position != -1) & others
        # An empty slot's value is finite, so that a weight of 0 makes nothing of it; its key may
        # be anything. So no load waits for positions, and those of later turns are under way.
        key = load_pairs(keys, slots, inside, HEAD_DIM, BLOCK_D, DOT)
        value = load_pairs(values, slots, others, HEAD_DIM, BLOCK_D, DOT)
        s = capped(tl.dot(q, tl.trans(key), input_precision="ieee") * SCALE, SOFTCAP)
        s = tl.where(held[None, :], s, -INFINITY)
        if GAIN != GAIN_NONE:
            kept = (g[:, None] < GROUP) & inside[None, :]
            tl.store(logits + g[:, None] * capacity + slots[None, :], s, mask=kept)
        peak, mass, numerator = gathered(s, value, peak, mass, numerator, DOT)
    return peak, mass, numerator


UNSPECIALISED = [
    "capacity",
    "splits",
    "mask_stride",
    "keys_row_stride",
    "values_row_stride",
    "key_scales_row_stride",
    "value_scales_row_stride",
    "scores_row_stride",
    "positions_row_stride",
    "history_row_stride",
    "H_row_stride",
    "z_row_stride",
    "logits_row_stride",
]
"""Numbers that differ by layer, batch or token, and must not lead to another compilation."""

UNALIGNED = ["mask", "rows", "lengths"]
"""Arrays that callers cut out of larger ones: each token's mask begins one byte further on."""


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def attend(
    q,
    k,
    v,
    mask,
    rows,
    lengths,
    heads,
    keys,
    values,
    key_scales,
    value_scales,
    scores,
    positions,
    history,
    H,
    z,
    slots,
    phi,
    psi,
    shift,
    logits,
    out,
    part_peak,
    part_mass,
    part_numerator,
    capacity,
    splits,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    mask_stride,
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
    HAS_MASK: tl.constexpr,
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
    SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
):
    """Kernel B: out = (φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), s = q·k·scale.

    The victim goes into H and z, the new pair into its slot, probabilities into the scores.

    Program (b·Hkv + h, split) reads its part of one head's slots once, for all its G query heads.
    Unless they are SPLIT among several it also concludes; else it leaves (m, mass, numerator), and
    `conclude_split` does.

    Shapes: q [B, Hq, D], k, v [B, Hkv, D], mask [B] by their strides; rows, lengths [B]; heads
    [Hkv, 3] as `head_slots` has it; slots [B, Hkv]; phi [B, Hq, R], psi [B, Hkv, R]; logits
    [B, N G], a head's [G, C] from G times its first slot; shift [B, Hq]; out [B, Hq, D];
    part_peak, part_mass [B, Hkv, splits, BLOCK_G], part_numerator [..., BLOCK_D]; the rest as
    `LayerArrays` has it, by the strides of its rows.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = head // KV_HEADS
    kv_head = head % KV_HEADS
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    query_heads = kv_head * GROUP + g
    real = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    taken = True
    if HAS_MASK:
        taken = tl.load(mask + sequence * mask_stride) != 0
    if taken:
        row = row_of(rows, sequence)
        first, count = head_slots(heads, kv_head, capacity)
        seen = tl.load(lengths + sequence).to(tl.int32)
        at = q + sequence * q_row_stride + query_heads[:, None] * q_head_stride + d[None, :]
        queries = tl.load(at, mask=real, other=0.0)
        slot = tl.load(slots + head)
        span = tl.cdiv(tl.cdiv(count, BLOCK_C), splits) * BLOCK_C
        # A sequence without tokens has no pairs, whatever its row holds.
        last = tl.where(seen > 0, tl.minimum(count, (split + 1) * span), 0)
        kept = logits
        if GAIN != GAIN_NONE:
            kept += sequence * logits_row_stride + first * GROUP
        part = (head * splits + split) * BLOCK_G + g
        numerators = part_numerator
        if KEY_CODES != "":
            numerators += (head * splits + split) * BLOCK_G * BLOCK_D
            peak, mass = over_codes(
                q + sequence * q_row_stride + kv_head * GROUP * q_head_stride,
                q_head_stride,
                row_start(keys, row, keys_row_stride, ALIGNED)
                + first * pair_numbers(KEY_CODES, HEAD_DIM),
                row_start(values, row, values_row_stride, ALIGNED)
                + first * pair_numbers(VALUE_CODES, HEAD_DIM),
                key_scales + row * key_scales_row_stride + first,
                value_scales + row * value_scales_row_stride + first,
                positions + row * positions_row_stride + first,
                kept,
                numerators,
                slot,
                split * span,
                last,
                count,
                KEY_CODES,
                VALUE_CODES,
                GAIN,
                SCALE,
                SOFTCAP,
                GROUP,
                BLOCK_G,
                BLOCK_C,
                BLOCK_D,
                AHEAD,
                DOT,
            )
        else:
            peak, mass, numerator = over_slots(
                queries.to(DOT),
                row_start(keys, row, keys_row_stride, ALIGNED) + first * HEAD_DIM,
                row_start(values, row, values_row_stride, ALIGNED) + first * HEAD_DIM,
                positions + row * positions_row_stride + first,
                kept,
                slot,
                split * span,
                last,
                count,
                GAIN,
                SCALE,
                SOFTCAP,
                GROUP,
                HEAD_DIM,
                BLOCK_G,
                BLOCK_C,
                BLOCK_D,
                DOT,
            )
        if SPLIT:
            tl.store(part_peak + part, peak)
            tl.store(part_mass + part, mass)
            if KEY_CODES == "":
                tl.store(part_numerator + part[:, None] * BLOCK_D + d[None, :], numerator)
        else:
            queries = queries.to(tl.float32)
            if KEY_CODES != "":
                # They lie in the order of codes; what others wrote is read in that of channels.
                tl.debug_barrier()
                at = numerators + g[:, None] * BLOCK_D + d[None, :]
                stored = real & (d < stored_channels(VALUE_CODES, HEAD_DIM))[None, :]
                numerator = tl.load(at, mask=stored, other=0.0)
            conclude(
                queries,
                k + sequence * k_row_stride + kv_head * k_head_stride,
                v + sequence * v_row_stride + kv_head * v_head_stride,
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
                count,
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
                KEY_CODES,
                VALUE_CODES,
                START,
                GAIN,
                DECAY,
                WINDOW,
                SCALE,
                SOFTCAP,
                GROUP,
                SINGLE,
                KV_HEADS,
                HEAD_DIM,
                RANK,
                ALIGNED,
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


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def conclude_split(
    q,
    k,
    v,
    mask,
    rows,
    lengths,
    heads,
    keys,
    values,
    key_scales,
    value_scales,
    scores,
    positions,
    history,
    H,
    z,
    slots,
    phi,
    psi,
    shift,
    logits,
    out,
    part_peak,
    part_mass,
    part_numerator,
    capacity,
    splits,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    mask_stride,
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
    HAS_MASK: tl.constexpr,
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
    """Merge the parts: m = max mᵢ, mass = Σ exp(mᵢ - m) massᵢ, numerators alike; then conclude.

    Program b·Hkv + h; parameters as in `attend`.
    """
    head = tl.program_id(0).to(tl.int64)
    sequence = head // KV_HEADS
    kv_head = head % KV_HEADS
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    query_heads = kv_head * GROUP + g
    real = (g[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    taken = True
    if HAS_MASK:
        taken = tl.load(mask + sequence * mask_stride) != 0
    if taken:
        row = row_of(rows, sequence)
        first, count = head_slots(heads, kv_head, capacity)
        seen = tl.load(lengths + sequence).to(tl.int32)
        slot = tl.load(slots + head)
        peak = tl.full([BLOCK_G], -INFINITY, tl.float32)
        mass = tl.zeros([BLOCK_G], tl.float32)
        numerator = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        held = real & (d < stored_channels(VALUE_CODES, HEAD_DIM))[None, :]
        for split in tl.range(0, bound(splits), num_stages=4):
            part = (head * splits + split) * BLOCK_G + g
            part_top = tl.load(part_peak + part)
            top = tl.maximum(peak, part_top)
            finite = tl.where(top == -INFINITY, 0.0, top)
            fade = tl.exp(peak - finite)
            gain = tl.exp(part_top - finite)
            mass = mass * fade + tl.load(part_mass + part) * gain
            at = part_numerator + part[:, None] * BLOCK_D + d[None, :]
            gained = tl.load(at, mask=held, other=0.0)
            numerator = numerator * fade[:, None] + gained * gain[:, None]
            peak = top
        at = q + sequence * q_row_stride + query_heads[:, None] * q_head_stride + d[None, :]
        queries = tl.load(at, mask=real, other=0.0).to(tl.float32)
        conclude(
            queries,
            k + sequence * k_row_stride + kv_head * k_head_stride,
            v + sequence * v_row_stride + kv_head * v_head_stride,
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
            count,
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
            KEY_CODES,
            VALUE_CODES,
            START,
            GAIN,
            DECAY,
            WINDOW,
            SCALE,
            SOFTCAP,
            GROUP,
            SINGLE,
            KV_HEADS,
            HEAD_DIM,
            RANK,
            ALIGNED,
            BLOCK_G,
            BLOCK_D,
            BLOCK_R,
            BLOCK_S,
        )
