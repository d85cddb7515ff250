"""The decode semantics over a whole known sequence at once, differentiable in the maps.

Training and evaluation know every token beforehand. Two passes then replace the token-by-token
loop: `eviction_times` runs the policy alone and notes when each pair leaves, and `attend` computes
all outputs in one masked product. The result equals `append` called token by token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import check_int
from .backends import get_backend
from .backends.torch_common import pair_logits
from .config import LayerConfig
from .feature_maps import LayerMaps
from .policies import Score
from .state import allocate

INFINITY = float("inf")


@torch.no_grad()
def eviction_times(layer: LayerConfig, q: Tensor, k: Tensor, *, prompt: int = 1) -> Tensor:
    """When each pair of known sequences leaves its slot.

    Parameters
    ----------
    layer
        Capacity, policy, scale; its rank does not matter.
    q
        [B, Hq, N, D], after the rotary embedding.
    k
        [B, Hkv, N, D], likewise.
    prompt
        How many of the first tokens come in one `append`; the others come one by one.

    Returns
    -------
    Tensor
        [B, Hkv, N] int32: the first query that no longer finds the pair in a slot; N for pairs
        that stay.

    Raises
    ------
    ValueError
        If `prompt` is not between 1 and N.
    """
    batch, kv_heads, tokens, _ = k.shape
    check_int("prompt", prompt, minimum=1, maximum=tokens)
    if layer.policy.score is Score.POSITION and prompt == 1:
        return _window_times(layer, k)
    sparse = dataclasses.replace(layer, rank=0, dtype=_name(k.dtype))
    backend = get_backend("torch")
    state = allocate(sparse, batch, device=k.device)
    # The last query that found the pair in a slot; its own at least.
    last = torch.arange(tokens, dtype=torch.int32, device=k.device).expand(batch, kv_heads, -1)
    last = last.contiguous()
    spare = torch.zeros(batch, kv_heads, 1, dtype=torch.int32, device=k.device)
    last = torch.cat([last, spare], 2)
    start = 0
    for stop in (prompt, *range(prompt + 1, tokens + 1)):
        keys = k[:, :, start:stop]
        backend.append(sparse, state, None, q[:, :, start:stop], keys, keys, None)
        # An empty slot's position, -1, is the spare column.
        held = state.positions.long() % (tokens + 1)
        last.scatter_(2, held, torch.full_like(held, stop - 1, dtype=torch.int32))
        start = stop
    times = last[:, :, :tokens] + 1
    # Within the prompt every query sees all before it: what its end evicts leaves after it.
    return times.clamp_min_(prompt)


def _window_times(layer: LayerConfig, k: Tensor) -> Tensor:
    """`eviction_times` of a window, which needs no look at the pairs."""
    batch, kv_heads, tokens, _ = k.shape
    position = torch.arange(tokens, dtype=torch.int32, device=k.device)
    leaves = position + (layer.capacity - layer.policy.sinks)
    stays = (position < layer.policy.sinks) | (leaves > tokens)
    return leaves.masked_fill_(stays, tokens).expand(batch, kv_heads, -1).contiguous()


def attend(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Every query's output, as `append` would give it.

    Parameters
    ----------
    layer
        Scale and softcap.
    maps
        φ and ψ; gradients flow into their tensors. ``None``: rank 0.
    q
        [B, Hq, N, D], after the rotary embedding.
    k, v
        [B, Hkv, N, D].
    times
        [B, Hkv, N], from `eviction_times`.
    rows
        [n] the queries wanted, in any order. Default: all.

    Returns
    -------
    Tensor
        [B, Hq, n, D].
    """
    batch, kv_heads, tokens, head_dim = k.shape
    positions = torch.arange(tokens, device=k.device)
    rows = positions if rows is None else rows
    queries = q[:, :, rows]
    shape = (batch, kv_heads, layer.group, len(rows), tokens)
    wide = torch.promote_types(q.dtype, torch.float32)

    gone = times.unsqueeze(2) <= rows.view(-1, 1)
    ahead = positions > rows.view(-1, 1)
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    logits = pair_logits(layer, grouped, k, wide).view(shape)
    logits = logits.masked_fill((gone | ahead).unsqueeze(2), -INFINITY)
    peak = logits.amax(4, keepdim=True).detach()
    if maps is None:
        weights = torch.exp(logits - peak)
    else:
        features = maps.phi(queries).reshape(*grouped.shape[:3], -1)
        kernel = (features @ maps.psi(k).transpose(2, 3)).view(shape)
        kernel = kernel.masked_fill(~gone.unsqueeze(2), 0)
        low_rank = kernel.sum(4, keepdim=True).detach()
        peak = torch.maximum(peak, low_rank.log())
        weights = torch.exp(logits - peak) + kernel * torch.exp(-peak)
    total = weights.sum(4, keepdim=True)
    weights = (weights / total).view(batch, kv_heads, -1, tokens)
    out = weights.to(v.dtype) @ v
    return out.view(batch, layer.query_heads, len(rows), head_dim)


def attend_all(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    *,
    block: int = 256,
    recompute: bool = True,
) -> Tensor:
    """Every query's output as `attend` gives it, `block` queries at a time.

    No [N, N] matrix is held, unless gradients flow and `recompute` is off.

    Parameters
    ----------
    layer, maps, q, k, v, times
        As of `attend`.
    block
        Queries at a time.
    recompute
        Where gradients flow, make a block's weights again in the backward pass instead of keeping
        them: more time, far less memory.

    Returns
    -------
    Tensor
        [B, Hq, N, D].
    """
    tokens = k.shape[2]
    parts = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = torch.arange(start, stop, device=k.device)
        before = (q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], times[:, :, :stop])
        if recompute and torch.is_grad_enabled():
            part = checkpoint(attend, layer, maps, *before, rows, use_reentrant=False)
        else:
            part = attend(layer, maps, *before, rows)
        parts.append(part)
    return torch.cat(parts, 2)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
