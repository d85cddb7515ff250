# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: SIM102 (Triton compiles these forms, and not their short ones)
"""Several new tokens at once: causal attention, then the column sums of its probabilities.

Columns are the C slots, then the S new pairs; query i is column C + i. No [S, C + S] matrix is
ever stored: the second pass forms each tile of probabilities anew from its log-sum-exp.
"""

import triton
import triton.language as tl

from .maths import INFINITY, bound, capped, gathered

UNSPECIALISED = ["tokens", "capacity"]


@triton.jit
def attended(
    queries,
    keys,
    values,
    positions,
    head,
    latest,
    first,
    last,
    peak,
    mass,
    numerator,
    columns_in_all,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """Go on with m, Σ exp(s - m), Σ exp(s - m) v over the columns from `first` to `last`.

    A query sees a column that holds a pair and is no later than its own, `latest` [BLOCK_M]. All
    values are finite, so that a weight of 0 makes nothing of one that it does not see: no load
    waits for positions. The compiler may find positions too small to load ahead, so they are loaded
    a turn ahead here.
    """
    d = tl.arange(0, BLOCK_D)
    # 64 bits to the head, 32 within it: half the registers of 64-bit pointers.
    positions += head * columns_in_all
    keys += head * columns_in_all * HEAD_DIM
    values += head * columns_in_all * HEAD_DIM
    columns = first + tl.arange(0, BLOCK_N)
    next_position = tl.load(positions + columns, mask=columns < columns_in_all, other=-1)
    for start in tl.range(bound(first), bound(last), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < columns_in_all
        held = next_position.to(tl.int32) != -1
        ahead = columns < columns_in_all - BLOCK_N
        next_position = tl.load(positions + BLOCK_N + columns, mask=ahead, other=-1)
        offsets = columns[:, None] * HEAD_DIM + d[None, :]
        wanted = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            wanted = wanted & (d[None, :] < HEAD_DIM)
        key = tl.load(keys + offsets, mask=wanted, other=0.0).to(DOT)
        value = tl.load(values + offsets, mask=wanted, other=0.0).to(DOT)
        s = capped(tl.dot(queries, tl.trans(key), input_precision="ieee") * SCALE, SOFTCAP)
        visible = held[None, :] & (columns[None, :] <= latest[:, None])
        s = tl.where(visible, s, -INFINITY)
        peak, mass, numerator = gathered(s, value, peak, mass, numerator, DOT)
    return peak, mass, numerator


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=["lengths"])
def attend_chunk(
    q,
    keys,
    values,
    positions,
    lengths,
    spoilt_from,
    phi,
    shift,
    H,
    z,
    out,
    log_mass,
    tokens,
    capacity,
    q_row_stride,
    q_head_stride,
    q_token_stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """Outputs (φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), and log_mass = log Σ exp(s).

    Program (b·Hq + h, tile) has BLOCK_M queries of one head. `lengths` are the tokens seen before:
    where there were none, no slot is looked at. A query that sees nothing gives 0, and log_mass 0;
    one at column `spoilt_from` or later sees a pair that is no number, which has no position here.

    Shapes: q [B, Hq, S, D] by its strides; keys, values [B, Hkv, C + S, D];
    positions [B, Hkv, C + S]; lengths [B]; spoilt_from [B, Hkv]; phi [B, Hq, S, R]; shift
    [B, Hq, S]; H [B, Hkv, R, D]; z [B, Hkv, R];
    out [B, Hq, S, D]; log_mass [B, Hq, S].
    """
    query_head = tl.program_id(0).to(tl.int64)
    # The last tiles look at the most columns: they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch_row = query_head // QUERY_HEADS
    head = query_head // GROUP
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = row < tokens
    inside = real[:, None] & (d[None, :] < HEAD_DIM)
    at = batch_row * q_row_stride + (query_head % QUERY_HEADS) * q_head_stride
    places = at + row.to(tl.int64)[:, None] * q_token_stride + d[None, :]
    queries = tl.load(q + places, mask=inside, other=0.0).to(DOT)
    peak = tl.full([BLOCK_M], -INFINITY, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    numerator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    columns_in_all = capacity + tokens

    seen = tl.load(lengths + batch_row)
    slots = tl.where(seen > 0, capacity, 0)
    stop = capacity + tl.minimum(tokens, (tile + 1) * BLOCK_M)
    # Slots that are empty are no columns to look at; the new pairs begin at column C.
    peak, mass, numerator = attended(
        queries,
        keys,
        values,
        positions,
        head,
        capacity + row,
        capacity - slots,
        stop,
        peak,
        mass,
        numerator,
        columns_in_all,
        SCALE,
        SOFTCAP,
        HEAD_DIM,
        BLOCK_N,
        BLOCK_D,
        DOT,
    )
    sees = mass > 0
    safe_mass = tl.where(sees, mass, 1.0)
    safe_peak = tl.where(sees, peak, 0.0)
    lines = query_head * tokens + row
    tl.store(log_mass + lines, safe_peak + tl.log(safe_mass), mask=real)
    if RANK > 0:
        # Before the first token the state is empty.
        if seen > 0:
            low_mass = tl.zeros([BLOCK_M], tl.float32)
            for r in tl.range(0, RANK):
                feature = tl.load(phi + lines * RANK + r, mask=real, other=0.0)
                low_mass += feature * tl.load(z + head * RANK + r)
            safe = tl.where(low_mass > 0, low_mass, 1.0)
            low_log = tl.where(low_mass > 0, tl.log(safe), -INFINITY)
            if shift is not None:
                low_log -= SCALE * tl.load(shift + lines, mask=real, other=0.0)
            over = tl.maximum(safe_peak, low_log)
            shrink = tl.exp(safe_peak - over)
            lift = tl.exp(low_log - over)
            safe_mass = safe_mass * shrink + lift
            numerator = numerator * shrink[:, None]
            for r in tl.range(0, RANK):
                feature = tl.load(phi + lines * RANK + r, mask=real, other=0.0)
                line = tl.load(H + (head * RANK + r) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
                share = feature * (lift / safe)
                numerator += share[:, None] * line[None, :]
    spoilt = capacity + row >= tl.load(spoilt_from + head)
    output = tl.where(spoilt[:, None], float("nan"), numerator / safe_mass[:, None])
    cells = lines[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + cells, output.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sum_columns(
    q,
    keys,
    positions,
    log_mass,
    weight,
    gained,
    tokens,
    capacity,
    q_row_stride,
    q_head_stride,
    q_token_stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums gained[j] = Σ_g Σ_i weight[i] p[g, i, j], p[g, i, j] = exp(s[g, i, j] - log_mass[g, i]).

    Program (b·Hkv + h, tile) has BLOCK_N columns of one head, and reads their keys once for the
    G query heads. weight [B, S]; gained [B, Hkv, C + S]; the rest as in `attend_chunk`.
    """
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    batch_row = head // KV_HEADS
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    columns_in_all = capacity + tokens
    inside = columns < columns_in_all
    position = tl.load(positions + head * columns_in_all + columns, mask=inside, other=-1).to(
        tl.int32
    )
    held = position != -1
    offsets = columns[:, None] * HEAD_DIM + d[None, :]
    wanted = held[:, None] & (d[None, :] < HEAD_DIM)
    key = tl.load(keys + head * columns_in_all * HEAD_DIM + offsets, mask=wanted, other=0.0).to(DOT)
    total = tl.zeros([BLOCK_N], tl.float32)
    # Queries before a new pair do not see it, and nobody sees a tile that holds none.
    first = tl.maximum(tile * BLOCK_N - capacity, 0) // BLOCK_M * BLOCK_M
    stop = tl.where(tl.max(position, 0) >= 0, tokens, 0)
    for member in tl.range(0, GROUP):
        query_head = head * GROUP + member
        at = batch_row * q_row_stride + (query_head % (KV_HEADS * GROUP)) * q_head_stride
        log_sums, counts = log_mass + query_head * tokens, weight + batch_row * tokens
        row = first + tl.arange(0, BLOCK_M)
        # Too small for the compiler to load them ahead.
        next_log_sum = tl.load(log_sums + row, mask=row < tokens, other=0.0)
        next_count = tl.load(counts + row, mask=row < tokens, other=0.0)
        for start in tl.range(bound(first), bound(stop), BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            real = row < tokens
            first_row = q + at + tl.full([], start, tl.int64) * q_token_stride
            places = tl.arange(0, BLOCK_M)[:, None] * q_token_stride + d[None, :]
            queries = tl.load(
                first_row + places, mask=real[:, None] & (d[None, :] < HEAD_DIM), other=0.0
            ).to(DOT)
            log_sum, count = next_log_sum, next_count
            ahead = row < tokens - BLOCK_M
            next_log_sum = tl.load(log_sums + BLOCK_M + row, mask=ahead, other=0.0)
            next_count = tl.load(counts + BLOCK_M + row, mask=ahead, other=0.0)
            s = capped(tl.dot(queries, tl.trans(key), input_precision="ieee") * SCALE, SOFTCAP)
            visible = held[None, :] & (columns[None, :] - capacity <= row[:, None])
            s = tl.where(visible, s, -INFINITY)
            total += tl.sum(tl.exp(s - log_sum[:, None]) * count[:, None], 0)
    tl.store(gained + head * columns_in_all + columns, total, mask=inside)
