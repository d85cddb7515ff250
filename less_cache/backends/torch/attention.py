"""Attention of several new tokens, and what their probabilities sum up to for each pair."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from . import prompt
from .maths import INFINITY, log_mass_of, scaled, with_low_rank
from .slots import RunSlots

BLOCK_BYTES = 64 * 2**20
"""What one block's logits may take."""

QUERIES_A_BLOCK = 256
"""Of a block whose probabilities are looked at one by one."""


def fastest(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """The attention of a chunk that a device runs best; both take and give the same."""
    return on_a_cpu if device.type == "cpu" else in_blocks


def on_a_cpu(
    layer: LayerConfig,
    slots: RunSlots,
    maps: LayerMaps | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`in_blocks` where there is nothing to wait for: padding is left out, not masked.

    Parameters and results are those of `in_blocks`.
    """
    held = positions != EMPTY
    # The new tokens of a row are the same for all its heads.
    real = held[:, 0, layer.capacity :]
    whole = bool(real.all())
    parts: list[tuple[slice, slice | Tensor]] = [(slice(None), slice(None))]
    if not whole:
        parts = [(slice(i, i + 1), row.nonzero().flatten()) for i, row in enumerate(real)]
    out = torch.zeros_like(q) if not whole else torch.empty_like(q)
    gained = torch.zeros(positions.shape, dtype=slots.wide)
    for rows, tokens in parts:
        if isinstance(tokens, Tensor) and not len(tokens):
            continue
        old, new = keys[rows].split([layer.capacity, q.shape[2]], 2)
        old_values, new_values = values[rows].split([layer.capacity, q.shape[2]], 2)
        queries = q[rows][:, :, tokens]
        kept = held[rows, :, : layer.capacity]
        found = prompt.causal_attention(
            queries,
            new[:, :, tokens],
            new_values[:, :, tokens],
            scale=layer.scale,
            softcap=layer.softcap,
            past=prompt.Past(old, old_values, kept) if bool(kept.any()) else None,
            weight=None if weight is None else weight[rows][:, tokens],
        )
        mean = found.mean
        if maps is not None and bool(slots.z[rows].any()):
            log_mass = found.log_mass
            if shift is not None:
                log_mass = log_mass + layer.scale * shift[rows][:, :, tokens]
            mean = prompt.add_low_rank(
                mean, log_mass, maps.phi(queries), slots.H[rows], slots.z[rows]
            )
        out[rows, :, tokens] = mean.to(out.dtype)
        if weight is not None:
            gained[rows, :, layer.capacity :][:, :, tokens] = found.gained_new
            if found.gained_past is not None:
                gained[rows, :, : layer.capacity] = found.gained_past
    return out, gained


def in_blocks(
    layer: LayerConfig,
    slots: RunSlots,
    maps: LayerMaps | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    weight: Tensor | None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs, and each pair's weighted sum of probabilities, a block of queries at a time.

    Nothing waits for the device. No [S, S] matrix is held: the largest temporary is one block's
    logits, `BLOCK_BYTES` of them.

    Parameters
    ----------
    layer, slots, maps
        Of heads of equal capacity C; H and z are those that the queries read.
    q
        [B, Hq, S, D], zero at padding.
    keys, values
        [B, heads, C + S, D], the slots' and the new ones.
    positions
        [B, heads, C + S], -1 where there is no pair.
    weight
        [B, S], what each query's probabilities count for; ``None``: they are not wanted.
    shift
        [B, Hq, S], added to the queries' products; ``None``: nothing. Not with a soft cap.

    Returns
    -------
    out
        [B, Hq, S, D], anything at padding.
    gained
        [B, heads, C + S].
    """
    batch, query_heads, new_tokens, head_dim = q.shape
    kv_heads, capacity = keys.shape[1], layer.capacity
    wide = slots.wide
    out = torch.empty_like(q)
    gained = torch.zeros(positions.shape, dtype=wide, device=q.device)
    keys, values = keys.to(wide), values.to(wide)
    # A masked probability is 0, and 0 * NaN is no 0: a pair that is not finite is left out, and
    # spoils afterwards the queries that see it.
    finite = (keys.isfinite() & values.isfinite()).all(3)
    keys, values = (x.masked_fill(~finite.unsqueeze(3), 0) for x in (keys, values))
    old, new = (~finite & (positions != EMPTY)).split([capacity, new_tokens], 2)
    spoilt = new.cumsum(2, dtype=torch.int32).add_(old.sum(2, keepdim=True)) > 0
    # The lowest number, not -inf, so that padding which sees nothing has a softmax all the same.
    lowest = torch.finfo(wide).min
    bias = torch.zeros_like(gained).masked_fill_(positions == EMPTY, lowest).unsqueeze(2)
    row_bytes = batch * query_heads * keys.shape[2] * wide.itemsize
    block = max(1, min(new_tokens, BLOCK_BYTES // row_bytes))
    for start in range(0, new_tokens, block):
        stop = min(start + block, new_tokens)
        span = capacity + stop
        queries = q[:, :, start:stop]
        shape = (batch, kv_heads, layer.group, stop - start)
        visible = bias[..., :span] + _causal(start, stop, capacity, q.device, wide)
        grouped = queries.reshape(batch, kv_heads, -1, head_dim).to(wide)
        logits = scaled(layer, grouped @ keys[:, :, :span].transpose(2, 3))
        logits.add_(visible.repeat(1, 1, layer.group, 1) if layer.group > 1 else visible)
        probabilities = logits.softmax(3)
        part = probabilities @ values[:, :, :span]
        if maps is not None:
            features = maps.phi(queries).reshape(*grouped.shape[:3], -1)
            log_mass = log_mass_of(logits, probabilities)
            if shift is not None:
                # Common to all pairs of a query, it only tells against the low-rank state.
                log_mass.add_(shift[:, :, start:stop].reshape(log_mass.shape), alpha=layer.scale)
            part = with_low_rank(slots, features, part, log_mass)
        marred = spoilt[:, :, start:stop].unsqueeze(2).unsqueeze(4)
        part = part.view(*shape, head_dim).masked_fill_(marred, math.nan)
        out[:, :, start:stop] = part.view(batch, query_heads, stop - start, head_dim)
        if weight is not None:
            share = weight[:, None, None, start:stop].expand(shape).reshape(*shape[:2], 1, -1)
            gained[:, :, :span] += (share @ probabilities).squeeze(2)
    return out, gained


def _causal(start: int, stop: int, kept: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[stop - start, kept + stop]: 0 for old pairs and new ones up to the query, else -inf."""
    query = torch.arange(start, stop, device=device).unsqueeze(1)
    column = torch.arange(-kept, stop, device=device)
    return torch.where(column <= query, 0.0, -INFINITY).to(dtype)
