"""Attention of many new tokens at once on a CPU: outputs, and what each pair gained, in one pass.

A block of queries makes its logits against all pairs that it sees, turns them into probabilities
where they lie, and uses these twice while they are in the cache: for the outputs and for the sums.
Exponentials are to base 2, with log2(e) folded into the queries: PyTorch's `exp2` takes a third of
the time of its `exp`.

PyTorch's own flash attention gives no such sums. It takes the queries that count for none where it
is as fast: many of them, each head with keys of its own.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

INFINITY = float("inf")

BLOCK_ROWS = 256
"""Queries in a block, times the heads of a group: enough for a fast matrix product."""

BLOCK_LOGITS = 2**20
"""A block's logits for each thread: what the processor's caches hold."""

FEWEST_QUERIES = 32
"""No block is split below this for the sake of the causal triangle."""

FLASH_FROM = 768
"""From here on PyTorch's flash attention works in large blocks."""


class Past(NamedTuple):
    """Pairs held before the new ones.

    Attributes
    ----------
    keys, values
        [B, Hkv, C, D]. Slots that hold no pair may hold anything.
    held
        [B, Hkv, C] bool, which slots hold a pair.
    """

    keys: Tensor
    values: Tensor
    held: Tensor


class Attended(NamedTuple):
    """What `causal_attention` finds.

    Attributes
    ----------
    mean
        [B, Hq, S, D], the values' mean under the softmax over the pairs, in the queries' dtype.
    log_mass
        [B, Hq, S], log Σ exp(logit) over the pairs; float64 for float64 queries, else float32.
    gained_new, gained_past
        [B, Hkv, S] and [B, Hkv, C], Σ weight × probability over queries and a group's heads, in
        `log_mass`'s dtype. Zero without weights. `gained_past` is ``None`` without a past.
    """

    mean: Tensor
    log_mass: Tensor
    gained_new: Tensor
    gained_past: Tensor | None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    past: Past | None = None,
    weight: Tensor | None = None,
) -> Attended:
    """Attend over all pairs of the past and the new ones up to each query.

    Products are formed in float32 for 16-bit inputs too; their logits are never rounded. NaN or
    infinity in a key or value reaches no query before it.

    Parameters
    ----------
    q
        [B, Hq, S, D], S ≥ 1, of any strides, as are the others.
    k, v
        [B, Hkv, S, D], Hq being a multiple of Hkv.
    scale
        What q·k is multiplied by.
    softcap
        c of c tanh(x / c), which the scaled products go through; ``None`` for none.
    past
        Pairs that every query sees.
    weight
        [S] or [B, S], what each query's probabilities count for; ``None`` for nothing. Sums are
        made from the first query on whose weight is not 0 in some row.
    """
    found = _attend(q, k, v, scale, softcap, past, weight, cuts=None)
    if math.isfinite(found.mean.sum(dtype=found.log_mass.dtype)):
        return found
    # A masked probability is 0, and 0 * NaN is no 0: blocks of queries must not reach beyond what
    # is not finite. So much only where an output shows that there may be some.
    finite = (k.isfinite() & v.isfinite()).all(3).all(1)
    if past is not None:
        empty = ~past.held.unsqueeze(3)
        keys, values = (x.masked_fill(empty, 0) for x in (past.keys, past.values))
        past = Past(keys, values, past.held)
    return _attend(q, k, v, scale, softcap, past, weight, cuts=~finite)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    past: Past | None,
    weight: Tensor | None,
    cuts: Tensor | None,
) -> Attended:
    """`causal_attention` in blocks of which none begins before a cut and ends after it.

    `cuts` is [B, S] booleans; ``None``: there are none.
    """
    batch, query_heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    kept = 0 if past is None else past.keys.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mean = q.new_empty(q.shape)
    log_mass = q.new_empty(q.shape[:3], dtype=wide)
    gained = q.new_zeros((batch, kv_heads, kept + tokens), dtype=wide)
    if weight is not None:
        weight = weight.to(wide).expand(batch, tokens)
    counted = _first_counted(weight, tokens)

    start = 0
    plain = past is None and softcap is None and cuts is None
    if plain and counted >= FLASH_FROM and _flash_is_as_fast(q, group):
        start = counted
        mean[:, :, :start], log_mass[:, :, :start] = _flash(
            q[:, :, :start], k[:, :, :start], v[:, :, :start], scale
        )
    if start < tokens:
        block = _block_shape(tokens - start, kept + tokens, group, kv_heads)
        for row in range(batch):
            starts = [*range(start, tokens, block.queries)]
            if cuts is not None:
                starts = sorted({*starts, *cuts[row].nonzero().flatten().tolist()})
            for first in range(0, kv_heads, block.heads):
                heads = slice(first, first + block.heads)
                grouped = slice(first * group, (first + block.heads) * group)
                keys, values = k[row, heads].to(wide), v[row, heads].to(wide)
                empty = None
                if past is not None:
                    keys = torch.cat([past.keys[row, heads].to(wide), keys], 1)
                    values = torch.cat([past.values[row, heads].to(wide), values], 1)
                    empty = ~past.held[row, heads]
                _attend_in_blocks(
                    q[row, grouped].unflatten(0, (-1, group)),
                    keys,
                    values,
                    empty,
                    None if weight is None else weight[row],
                    starts,
                    block.queries,
                    counted,
                    scale,
                    softcap,
                    mean[row, grouped].unflatten(0, (-1, group)),
                    log_mass[row, grouped].unflatten(0, (-1, group)),
                    gained[row, heads],
                )
    return Attended(
        mean, log_mass, gained[:, :, kept:], None if past is None else gained[:, :, :kept]
    )


def add_low_rank(mean: Tensor, log_mass: Tensor, features: Tensor, H: Tensor, z: Tensor) -> Tensor:
    """Join the pairs' mean with the low-rank state: (M mean + φH) / (M + φz), M = exp(log_mass).

    It is a mean of two means, so that no exponential is left that could overflow. An empty state
    adds nothing.

    Parameters
    ----------
    mean, log_mass
        [B, Hq, S, D] and [B, Hq, S], as from `causal_attention`.
    features
        [B, Hq, S, R], φ of the queries.
    H, z
        [B, Hkv, R, D] and [B, Hkv, R].

    Returns
    -------
    out
        [B, Hq, S, D], in `log_mass`'s dtype.
    """
    wide = log_mass.dtype
    batch, kv_heads = z.shape[:2]
    features = features.to(wide).reshape(batch, kv_heads, -1, z.shape[2])
    low_rank = (features @ z.to(wide).unsqueeze(3)).view_as(log_mass)
    odds = low_rank.log() - log_mass
    # What φH is divided by is φz over the state's share of the whole.
    factor = odds.sigmoid() / low_rank.clamp_min(torch.finfo(wide).tiny)
    added = (features * factor.view(batch, kv_heads, -1, 1)) @ H.to(wide)
    return added.view_as(mean).addcmul_(mean.to(wide), odds.neg().sigmoid().unsqueeze(3))


def _first_counted(weight: Tensor | None, tokens: int) -> int:
    """The first query whose probabilities count for something, or `tokens`."""
    if weight is None:
        return tokens
    counts = (weight != 0).any(0).nonzero()
    return int(counts[0]) if counts.numel() else tokens


def _flash_is_as_fast(q: Tensor, group: int) -> bool:
    # In float16 it takes half as long again as products in float32. For groups, keys would have
    # to be repeated, and its blocks hold one query head where ours hold all.
    return q.device.type == "cpu" and group == 1 and q.dtype != torch.float16


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (array if array.stride(3) == 1 else array.contiguous() for array in (q, k, v))
    out, log_mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=scale
    )
    return out, log_mass


class _Block(NamedTuple):
    """How much is done at once."""

    queries: int
    heads: int


def _block_shape(tokens: int, columns: int, group: int, kv_heads: int) -> _Block:
    """Blocks that fill the caches, of which the causal triangle wastes little."""
    queries = max(FEWEST_QUERIES, min(-(-tokens // 4), BLOCK_LOGITS // columns))
    queries = max(1, min(tokens, queries, BLOCK_ROWS // group))
    # A thread takes whole heads where there are as many.
    threads = torch.get_num_threads()
    heads = threads * max(1, BLOCK_LOGITS // (queries * group * columns))
    return _Block(queries, min(kv_heads, heads))


def _attend_in_blocks(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    empty: Tensor | None,
    weight: Tensor | None,
    starts: list[int],
    largest: int,
    counted: int,
    scale: float,
    softcap: float | None,
    mean: Tensor,
    log_mass: Tensor,
    gained: Tensor,
) -> None:
    """Fill in a few heads' outputs, and add to what their pairs gained.

    Parameters
    ----------
    q, mean
        [H, G, S, D].
    keys, values
        [H, C + S, D], the past first.
    empty
        [H, C], which slots hold no pair.
    weight
        [S].
    starts
        Where each block of queries starts; it ends where the next one does.
    largest
        Queries in a block, at most.
    counted
        The first query whose weight counts.
    scale, softcap
        As for `causal_attention`.
    log_mass
        [H, G, S].
    gained
        [H, C + S].
    """
    heads, group, tokens, head_dim = q.shape
    columns, wide = keys.shape[1], keys.dtype
    kept = columns - tokens
    log2_e = math.log2(math.e)
    factor = scale * log2_e if softcap is None else scale / softcap
    buffer = keys.new_empty(heads * group * largest * columns)
    future = keys.new_full((largest, largest), -INFINITY).triu_(1)
    bias = None
    if empty is not None:
        bias = torch.zeros_like(empty, dtype=wide).masked_fill_(empty, -INFINITY).unsqueeze(1)
    for start, stop in pairwise([*starts, tokens]):
        size, seen = stop - start, kept + stop
        rows = (q[:, :, start:stop].to(wide) * factor).reshape(heads, group * size, head_dim)
        logits = buffer[: heads * group * size * seen].view(heads, group * size, seen)
        torch.bmm(rows, keys[:, :seen].transpose(1, 2), out=logits)
        if softcap is not None:
            logits.tanh_().mul_(softcap * log2_e)
        newest = logits.view(heads, group, size, seen)[..., kept + start :]
        newest.add_(future[:size, :size])
        if bias is not None:
            logits[:, :, :kept].add_(bias)
        peak = logits.amax(2, keepdim=True)
        unscaled = logits.sub_(peak).exp2_()
        mass = unscaled.sum(2, keepdim=True)
        part = torch.bmm(unscaled, values[:, :seen]).div_(mass)
        mean[:, :, start:stop] = part.view(heads, group, size, head_dim)
        log_mass[:, :, start:stop] = (
            peak.add_(mass.log2()).mul_(math.log(2)).view(heads, group, size)
        )
        if weight is not None and stop > counted:
            share = weight[start:stop].repeat(group) / mass.transpose(1, 2)
            gained[:, :seen].unsqueeze(1).baddbmm_(share, unscaled)
