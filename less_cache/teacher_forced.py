"""The decode semantics over a whole known sequence at once, differentiable in the maps.

Training and evaluation know every token beforehand. Two passes then replace the token-by-token
loop: `eviction_times` runs the policy alone and notes when each pair leaves, and `attend` computes
all outputs in one masked product. The result equals `CacheManager.attend` called token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import check_choice, check_int
from .backends import BACKENDS, best_backend, get_backend
from .config import CacheConfig
from .layer_config import LayerConfig
from .layer_maps import LayerMaps

INFINITY = float("inf")


@torch.no_grad()
def eviction_times(
    layer: LayerConfig,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    prompt: int = 1,
    backend: str = "auto",
) -> Tensor:
    """When each pair of known sequences leaves its slot.

    Parameters
    ----------
    layer
        Capacities, policy, scale; its rank does not matter.
    q
        [B, Hq, N, D], after the rotary embedding.
    k
        [B, Hkv, N, D], likewise.
    mask
        [B, N] booleans, false at padding; ``None``: no padding.
    prompt
        How many of the first tokens come in one call; the others come one by one.
    backend
        As of `CacheManager`.

    Returns
    -------
    Tensor
        [B, Hkv, N] int32: the first query that no longer finds the pair in a slot; N for pairs
        that stay; at padding, which never is in a slot, its own index.

    Raises
    ------
    ValueError
        If `prompt` is not between 1 and N, or a policy that never evicts has no room for all.
    """
    tokens = k.shape[2]
    check_int("prompt", prompt, minimum=1, maximum=tokens)
    check_choice("backend", backend, ("auto", *BACKENDS))
    if not layer.policy.evicts and tokens > min(layer.capacities):
        raise ValueError(
            f"k: {tokens} tokens, but {layer.policy} holds at most capacity = "
            f"{min(layer.capacities)}"
        )
    if backend == "auto":
        backend = best_backend(_sparse_config(layer, k), k.device.type)
    return get_backend(backend).eviction_times(layer, q, k, mask, prompt=prompt)


def _sparse_config(layer: LayerConfig, k: Tensor) -> CacheConfig:
    """A config of one such layer, without the low-rank state that no eviction depends on."""
    return CacheConfig(
        num_layers=1,
        query_heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        capacity=max(layer.capacities),
        policy=layer.policy,
        rank=0,
        dtype=k.dtype,
    )


def attend(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Every query's output, as the step would give it.

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
    logits = pair_logits(layer, grouped.to(wide), k.to(wide)).view(shape)
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


def pair_logits(layer: LayerConfig, queries: Tensor, keys: Tensor) -> Tensor:
    """q·k·scale, soft-capped where the model does so: [..., M, N] from [..., M, D], [..., N, D]."""
    logits = queries @ keys.transpose(2, 3) * layer.scale
    if layer.softcap is None:
        return logits
    return (logits / layer.softcap).tanh() * layer.softcap
