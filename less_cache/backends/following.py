"""When pairs of known sequences leave, for backends without a scan: the step runs over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arrays import empty_arrays
from ..layer_config import LayerConfig
from ..policies import Start


def eviction_times(
    attend: Callable[..., Any],
    layer: LayerConfig,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *,
    prompt: int,
) -> Tensor:
    """What `Backend.eviction_times` gives, by way of a backend's `attend`."""
    policy = layer.policy
    batch, kv_heads, tokens, _ = k.shape
    whole = policy.starts is Start.POSITION and not policy.custom and mask is None
    if whole and prompt == 1:
        return window_times(layer, k)
    dtype = str(k.dtype).removeprefix("torch.")
    sparse = dataclasses.replace(layer, rank=0, dtype=dtype, position_dtype="int32")
    arrays = empty_arrays(sparse, batch, device=k.device)
    real = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if mask is None else mask
    # The column of each token, by its position; what is not there is the spare column.
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    order = torch.cat([order, torch.full_like(order[:, :1], tokens)], 1)
    # The last query that found the pair in a slot; its own at least.
    last = torch.arange(tokens + 1, dtype=torch.int32, device=k.device)
    last = last.expand(batch, kv_heads, -1).contiguous()
    seen = torch.zeros(batch, dtype=torch.int64, device=k.device)
    start = 0
    for stop in (prompt, *range(prompt + 1, tokens + 1)):
        keys, queries = k[:, :, start:stop], q[:, :, start:stop]
        padding = None if mask is None else real[:, start:stop]
        attend(sparse, arrays, None, queries, keys, keys, lengths=seen, mask=padding, clean=True)
        seen += real[:, start:stop].sum(1)
        for run in layer.runs:
            held = arrays.of_run(run).positions.long() % (tokens + 1)
            columns = order.unsqueeze(1).expand(-1, run.heads, -1).gather(2, held)
            last[:, run.kv_heads].scatter_(
                2, columns, torch.full_like(columns, stop - 1, dtype=torch.int32)
            )
        start = stop
    times = last[:, :, :tokens] + 1
    # Within the prompt every query sees all before it: what its end evicts leaves after it.
    times.clamp_min_(prompt)
    own = torch.arange(tokens, dtype=torch.int32, device=k.device)
    return times if mask is None else torch.where(real.unsqueeze(1), times, own)


def window_times(layer: LayerConfig, k: Tensor) -> Tensor:
    """`eviction_times` of a window without padding, which needs no look at the pairs."""
    batch, kv_heads, tokens, _ = k.shape
    position = torch.arange(tokens, dtype=torch.int32, device=k.device)
    times = []
    for capacity in layer.capacities:
        leaves = position + (capacity - layer.policy.sinks)
        stays = (position < layer.policy.sinks) | (leaves > tokens)
        times.append(leaves.masked_fill(stays, tokens))
    return torch.stack(times).expand(batch, kv_heads, -1).contiguous()
