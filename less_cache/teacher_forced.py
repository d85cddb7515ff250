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
from .feature_maps import LayerMaps
from .layer_config import LayerConfig
from .quantization import codes
from .quantization.transforms import LayerTransforms, layer_transforms

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
    transforms: LayerTransforms | None = None,
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
    transforms
        The bases of the layer's codes, where it has calibrated ones.

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
    own = layer_transforms(layer, transforms)
    if own is not None:
        q, k, _, _ = own.to(k.device, torch.promote_types(k.dtype, torch.float32)).enter(q, k, k)
    return get_backend(backend).eviction_times(layer, q, k, mask, prompt=prompt)


@torch.no_grad()
def stored_pairs(
    layer: LayerConfig, k: Tensor, v: Tensor, transforms: LayerTransforms | None = None
) -> tuple[Tensor, Tensor] | None:
    """Keys and values as slots give them back, coded once; ``None`` where they stay as they are.

    Parameters
    ----------
    layer
        How pairs are coded.
    k, v
        [B, Hkv, N, D], keys after the rotary embedding.
    transforms
        The bases of the layer's codes, where it has calibrated ones.
    """
    own = layer_transforms(layer, transforms)
    if own is None or layer.key_layout is None or layer.value_layout is None:
        return None
    wide = torch.promote_types(k.dtype, torch.float32)
    own = own.to(k.device, wide)
    inner_k, inner_v = own.enter_keys(k.to(wide)), own.enter_values(v.to(wide))
    inner_k = codes.decode(layer.key_layout, *codes.encode(layer.key_layout, inner_k), wide)
    inner_v = codes.decode(layer.value_layout, *codes.encode(layer.value_layout, inner_v), wide)
    return own.leave_keys(inner_k), own.leave(inner_v)


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
    stored: tuple[Tensor, Tensor] | None = None,
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
    stored
        From `stored_pairs`: what all queries but a pair's own read in its place.

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
    held_k, held_v = (k, v) if stored is None else stored
    logits = pair_logits(layer, grouped.to(wide), held_k.to(wide)).view(shape)
    own = rows.expand(shape[:-1]).unsqueeze(4)
    if stored is not None:
        exact = grouped.view(*shape[:-1], head_dim).to(wide) * k[:, :, None, rows].to(wide)
        logits = logits.scatter(4, own, _logits(layer, exact.sum(4, keepdim=True)))
    logits = logits.masked_fill((gone | ahead).unsqueeze(2), -INFINITY)
    peak = logits.amax(4, keepdim=True).detach()
    if maps is None:
        weights = torch.exp(logits - peak)
    else:
        features = maps.phi(queries).reshape(*grouped.shape[:3], -1)
        kernel = (features @ maps.psi(held_k).transpose(2, 3)).view(shape)
        kernel = kernel.masked_fill(~gone.unsqueeze(2), 0)
        low_rank = kernel.sum(4, keepdim=True).detach()
        peak = torch.maximum(peak, low_rank.log())
        weights = torch.exp(logits - peak) + kernel * torch.exp(-peak)
    total = weights.sum(4, keepdim=True)
    weights = weights / total
    out = weights.view(batch, kv_heads, -1, tokens).to(v.dtype) @ held_v.to(v.dtype)
    if stored is not None:
        missing = (v - held_v.to(v.dtype))[:, :, None, rows] * weights.gather(4, own).to(v.dtype)
        out = out + missing.view_as(out)
    return out.view(batch, layer.query_heads, len(rows), head_dim)


def attend_all(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    stored: tuple[Tensor, Tensor] | None = None,
    *,
    block: int = 256,
    recompute: bool = True,
) -> Tensor:
    """Every query's output as `attend` gives it, `block` queries at a time.

    No [N, N] matrix is held, unless gradients flow and `recompute` is off.

    Parameters
    ----------
    layer, maps, q, k, v, times, stored
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
        held = None if stored is None else (stored[0][:, :, :stop], stored[1][:, :, :stop])
        if recompute and torch.is_grad_enabled():
            part = checkpoint(attend, layer, maps, *before, rows, held, use_reentrant=False)
        else:
            part = attend(layer, maps, *before, rows, held)
        parts.append(part)
    return torch.cat(parts, 2)


def pair_logits(layer: LayerConfig, queries: Tensor, keys: Tensor) -> Tensor:
    """q·k·scale, soft-capped where the model does so: [..., M, N] from [..., M, D], [..., N, D]."""
    return _logits(layer, queries @ keys.transpose(2, 3))


def _logits(layer: LayerConfig, products: Tensor) -> Tensor:
    logits = products * layer.scale
    if layer.softcap is None:
        return logits
    return (logits / layer.softcap).tanh() * layer.softcap
