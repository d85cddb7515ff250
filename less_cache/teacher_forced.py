"""The decode semantics over a whole known sequence at once, differentiable in the maps.

Training and evaluation know every token beforehand. Two passes then replace the token-by-token
loop: `eviction_times` runs the policy alone and notes when each pair leaves, and `attend` computes
all outputs in one masked product. The result equals `CacheManager.attend` called token by token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import check_choice, check_int
from ._precision import without_autocast
from .backends import BACKENDS, best_backend, get_backend
from .config import CacheConfig
from .layer_config import LayerConfig
from .layer_maps import LayerMaps
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
    if not layer.policy.evicts:
        own = torch.arange(tokens, dtype=torch.int32, device=k.device)
        stays = torch.full(k.shape[:3], tokens, dtype=torch.int32, device=k.device)
        return stays if mask is None else torch.where(mask.unsqueeze(1), stays, own)
    if backend == "auto":
        backend = best_backend(_sparse_config(layer, k), k.device.type)
    with without_autocast(k):
        basis = layer_transforms(layer, transforms)
        if basis is not None:
            wide = torch.promote_types(k.dtype, torch.float32)
            q, k, _, _ = basis.to(k.device, wide).enter(q, k, k)
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
    layouts = (layer.key_layout, layer.value_layout)
    held = codes.encode_pairs(*layouts, own.enter_keys(k.to(wide)), own.enter_values(v.to(wide)))
    keys, values = codes.decode_pairs(*layouts, held, wide)
    return own.leave_keys(keys), own.leave(values)


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


class Past(NamedTuple):
    """What heads hold before the known tokens come.

    Attributes
    ----------
    keys, values
        [B, Hkv, P, D]; a column that is no pair may hold any finite numbers.
    held
        [B, Hkv, P] booleans, which columns are pairs.
    times
        [B, Hkv, P], as from `eviction_times`; 0 for a pair that no query finds, or no pair.
    H, z
        [B, Hkv, R, D] and [B, Hkv, R].
    """

    keys: Tensor
    values: Tensor
    held: Tensor
    times: Tensor
    H: Tensor
    z: Tensor


def attend(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    past: Past | None = None,
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
    mask
        [B, N] booleans, false at padding, which may hold anything; ``None``: no padding.
    past
        What came before; no gradient flows into it. ``None``: nothing.
    stored
        From `stored_pairs`: what all queries but a pair's own read in its place.

    Returns
    -------
    Tensor
        [B, Hq, n, D], zero at padding.
    """
    with without_autocast(k):
        return _attend(layer, maps, q, k, v, times, rows, mask, past, stored)


def _attend(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    past: Past | None,
    stored: tuple[Tensor, Tensor] | None,
) -> Tensor:
    batch, kv_heads, tokens, head_dim = k.shape
    columns = torch.arange(tokens, device=k.device)
    rows = columns if rows is None else rows
    if mask is not None:
        q, k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (q, k, v))
    queries = q[:, :, rows]
    own_k, own_v, own = k[:, :, rows], v[:, :, rows], rows
    if stored is not None:
        k, v = (x if mask is None else x.masked_fill(~mask[:, None, :, None], 0) for x in stored)
        v = v.to(own_v.dtype)
    pairs = None if mask is None else mask.unsqueeze(1)
    if past is not None:
        new = k.new_ones(times.shape, dtype=torch.bool)
        pairs = torch.cat([past.held, new if pairs is None else new & pairs], 2)
        k, v = torch.cat([past.keys.to(k), k], 2), torch.cat([past.values.to(v), v], 2)
        times = torch.cat([past.times, times], 2)
        columns = torch.cat([columns.new_full((past.times.shape[2],), -1), columns])
        own = rows + past.times.shape[2]
    shape = (batch, kv_heads, layer.group, len(rows), len(columns))
    wide = torch.promote_types(q.dtype, torch.float32)

    gone = times.unsqueeze(2) <= rows.view(-1, 1)
    hidden = gone | (columns > rows.view(-1, 1))
    if mask is not None:
        # Padding sees itself, so that its softmax has something to sum up.
        hidden = hidden & (columns != rows.view(-1, 1))
    if pairs is not None:
        gone = gone & pairs.unsqueeze(2)
    grouped = queries.reshape(batch, kv_heads, -1, head_dim)
    logits = pair_logits(layer, grouped.to(wide), k.to(wide)).view(shape)
    own = own.expand(shape[:4]).unsqueeze(4)
    if stored is not None:
        products = grouped.view(*shape[:4], head_dim).to(wide) * own_k.unsqueeze(2).to(wide)
        logits = logits.scatter(4, own, _logits(layer, products.sum(4, keepdim=True)))
    logits = logits.masked_fill(hidden.unsqueeze(2), -INFINITY)
    peak = logits.amax(4, keepdim=True).detach()
    remembered: Tensor | None = None
    if maps is None:
        weights = torch.exp(logits - peak)
        total = weights.sum(4, keepdim=True)
    else:
        features = maps.phi(queries).reshape(*grouped.shape[:3], -1)
        kernel = (features @ maps.psi(k).transpose(2, 3)).view(shape)
        kernel = kernel.masked_fill(~gone.unsqueeze(2), 0)
        low_rank = kernel.sum(4, keepdim=True)
        if past is not None:
            low_rank = low_rank + (features @ past.z.to(wide).unsqueeze(3)).view(*shape[:4], 1)
        peak = torch.maximum(peak, low_rank.detach().log())
        # An empty state must not meet an exponential that overflows: 0 * inf is no 0.
        lift = torch.exp(-peak.clamp_min(math.log(torch.finfo(wide).tiny)))
        pairs_weights = torch.exp(logits - peak)
        weights = pairs_weights + kernel * lift
        total = pairs_weights.sum(4, keepdim=True) + low_rank * lift
        if past is not None:
            state = (features @ past.H.to(wide)).view(*shape[:4], head_dim)
            remembered = (state * (lift / total)).view(batch, kv_heads, -1, head_dim)
    weights = weights / total
    out = weights.view(batch, kv_heads, -1, len(columns)).to(v.dtype) @ v
    if stored is not None:
        missing = (own_v - stored[1][:, :, rows].to(v.dtype)).unsqueeze(2)
        out = out + (missing * weights.gather(4, own).to(v.dtype)).view_as(out)
    if remembered is not None:
        out = out + remembered.to(v.dtype)
    out = out.view(batch, layer.query_heads, len(rows), head_dim)
    return out if mask is None else out.masked_fill(~mask[:, rows].view(batch, 1, -1, 1), 0)


def attend_all(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    *,
    mask: Tensor | None = None,
    past: Past | None = None,
    stored: tuple[Tensor, Tensor] | None = None,
    block: int = 256,
    recompute: bool = True,
) -> Tensor:
    """Every query's output as `attend` gives it, `block` queries at a time.

    No [N, N] matrix is held, unless gradients flow and `recompute` is off.

    Parameters
    ----------
    layer, maps, q, k, v, times, mask, past, stored
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
        real = None if mask is None else mask[:, :stop]
        held = None if stored is None else (stored[0][:, :, :stop], stored[1][:, :, :stop])
        rest = (rows, real, past, held)
        if recompute and torch.is_grad_enabled():
            part = checkpoint(attend, layer, maps, *before, *rest, use_reentrant=False)
        else:
            part = attend(layer, maps, *before, *rest)
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
