# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# ruff: noqa: RUF005 (Triton compiles these forms, and not their short ones)
"""Kernel B over coded pairs: products are formed on the codes as they are.

A logit is s_k (q·code - q·center) and an output is Σ p s_v code - center Σ p s_v: no tensor of keys
or values is formed, and codes become numbers of 16 bits exactly.
"""

import triton
import triton.language as tl

from .codes import channels_of, codes_in, load_bytes, units_of
from .maths import GAIN_NONE, INFINITY, bound, capped
from .planes import segment, segments


@triton.jit
def placed_queries(q, head_stride, CODES: tl.constexpr, GROUP, BLOCK_G: tl.constexpr, DOT):
    """Queries of a group by segment, [BLOCK_G, places] each, and what the centers sum to.

    The sums are of the queries as they are rounded for the products, so that nothing is lost when
    the one is taken from the other. `q` points at the group's first.
    """
    g = tl.arange(0, BLOCK_G)
    placed = ()
    central = tl.zeros([BLOCK_G], tl.float32)
    for i in tl.static_range(segments(CODES)):
        channel, real = channels_of(CODES, i)
        wanted = (g[:, None] < GROUP) & real[None, :]
        at = q + g[:, None] * head_stride + channel[None, :]
        # Powers of two: nothing is lost.
        unit = units_of(CODES, i)[None, :]
        query = (tl.load(at, mask=wanted, other=0.0) * unit).to(DOT)
        central += segment(CODES, i, "center") * tl.sum(query.to(tl.float32) / unit, 1)
        placed = placed + (query,)
    return placed, central


@triton.jit
def all_bytes(stored, slots, inside, CODES: tl.constexpr, DOT: tl.constexpr):
    """What `load_bytes` finds in each segment, a tuple of tuples."""
    found = ()
    for i in tl.static_range(segments(CODES)):
        found = found + (load_bytes(stored, slots, inside, CODES, i, DOT),)
    return found


@triton.jit
def products(
    queries, found, CODES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, DOT
):
    """Sums q·code [BLOCK_G, BLOCK_C] over all segments."""
    total = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
    for i in tl.static_range(segments(CODES)):
        codes = codes_in(found[i], CODES, i, DOT)
        total = tl.dot(queries[i], tl.trans(codes), total, input_precision="ieee")
    return total


@triton.jit
def over_codes(
    q,
    q_head_stride,
    keys,
    values,
    key_scales,
    value_scales,
    positions,
    logits,
    numerators,
    slot,
    first,
    last,
    capacity,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    GAIN: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
    DOT: tl.constexpr,
):
    """`attend.over_slots` over codes; Σ exp(s - m) v goes to `numerators` [BLOCK_G, BLOCK_D].

    The compiler loads a tile's bytes two turns ahead, but not what is as small as positions and
    scales, nor bytes of which a thread has fewer than four. So positions and scales are loaded here
    one turn ahead, and bytes, too, if AHEAD.

    All pointers are at their first of this head. Returns m [BLOCK_G] and mass [BLOCK_G].
    """
    g = tl.arange(0, BLOCK_G)
    queries, central = placed_queries(q, q_head_stride, KEY_CODES, GROUP, BLOCK_G, DOT)
    peak = tl.full([BLOCK_G], -INFINITY, tl.float32)
    mass = tl.zeros([BLOCK_G], tl.float32)
    level = tl.zeros([BLOCK_G], tl.float32)
    # Numerators are counted in the largest scale so far, so that shares fit into 16 bits.
    unit = tl.full([], 0.0, tl.float32)
    sums = ()
    for i in tl.static_range(segments(VALUE_CODES)):
        sums = sums + (tl.zeros([BLOCK_G, segment(VALUE_CODES, i, "places")], tl.float32),)
    slots = first + tl.arange(0, BLOCK_C)
    near = slots < last
    next_position = tl.load(positions + slots, mask=near, other=-1)
    next_key_scale = tl.load(key_scales + slots, mask=near, other=0.0)
    next_value_scale = tl.load(value_scales + slots, mask=near, other=0.0)
    if AHEAD:
        next_keys = all_bytes(keys, slots, near, KEY_CODES, DOT)
        next_values = all_bytes(values, slots, near, VALUE_CODES, DOT)
    for start in tl.range(bound(first), bound(last), BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C)
        inside = slots < capacity
        ahead = slots < capacity - BLOCK_C
        # Whatever an empty slot's bytes are, they are codes; only its scales may be no numbers. So
        # no load waits for the positions.
        held = (next_position.to(tl.int32) != -1) & (slots != slot)
        key_scale, value_scale = next_key_scale.to(tl.float32), next_value_scale.to(tl.float32)
        next_position = tl.load(positions + BLOCK_C + slots, mask=ahead, other=-1)
        next_key_scale = tl.load(key_scales + BLOCK_C + slots, mask=ahead, other=0.0)
        next_value_scale = tl.load(value_scales + BLOCK_C + slots, mask=ahead, other=0.0)
        if AHEAD:
            key_bytes, value_bytes = next_keys, next_values
            next_keys = all_bytes(keys, BLOCK_C + slots, ahead, KEY_CODES, DOT)
            next_values = all_bytes(values, BLOCK_C + slots, ahead, VALUE_CODES, DOT)
        else:
            key_bytes = all_bytes(keys, slots, inside, KEY_CODES, DOT)
            value_bytes = all_bytes(values, slots, inside, VALUE_CODES, DOT)
        s = products(queries, key_bytes, KEY_CODES, BLOCK_G, BLOCK_C, DOT) - central[:, None]
        s = capped(s * (key_scale * SCALE)[None, :], SOFTCAP)
        s = tl.where(held[None, :], s, -INFINITY)
        if GAIN != GAIN_NONE:
            kept = (g[:, None] < GROUP) & inside[None, :]
            tl.store(logits + g[:, None] * capacity + slots[None, :], s, mask=kept)
        value_scale = tl.where(held, value_scale, 0.0)
        largest = tl.maximum(unit, tl.max(value_scale, 0))
        divisor = tl.where(largest > 0, largest, 1.0)
        top = tl.maximum(peak, tl.max(s, 1))
        finite = tl.where(top == -INFINITY, 0.0, top)
        weights = tl.exp(s - finite[:, None])
        fade = tl.exp(peak - finite)
        mass = mass * fade + tl.sum(weights, 1)
        shares = (weights * (value_scale * (1.0 / divisor))[None, :]).to(DOT)
        fade = fade * (unit / divisor)
        level = level * fade + tl.sum(shares.to(tl.float32), 1)
        added = ()
        for i in tl.static_range(segments(VALUE_CODES)):
            codes = codes_in(value_bytes[i], VALUE_CODES, i, DOT)
            total = tl.dot(shares, codes, sums[i] * fade[:, None], input_precision="ieee")
            added = added + (total,)
        sums = added
        peak = top
        unit = largest
    for i in tl.static_range(segments(VALUE_CODES)):
        channel, real = channels_of(VALUE_CODES, i)
        total = sums[i] * units_of(VALUE_CODES, i)[None, :]
        total = (total - segment(VALUE_CODES, i, "center") * level[:, None]) * unit
        at = numerators + g[:, None] * BLOCK_D + channel[None, :]
        tl.store(at, total, mask=real[None, :] & (g[:, None] < GROUP))
    return peak, mass
