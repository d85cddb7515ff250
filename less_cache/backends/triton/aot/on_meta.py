"""Caches, maps and tokens without data, whose calls show what would be launched."""

from __future__ import annotations

import torch
from torch import Tensor

from ....arrays import LayerArrays, empty_arrays
from ....layer_config import LayerConfig
from ....layer_maps import LayerMaps, tensor_shapes
from ..decode import step


def meta_maps(layer: LayerConfig, kind: str | None, hidden: int) -> LayerMaps | None:
    """Maps of that kind and hidden size, as the backend has them; ``None`` without a kind."""
    if kind is None:
        return None
    shapes = tensor_shapes(
        kind,
        query_heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        hidden=hidden,
        rank=layer.rank,
    )
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return LayerMaps(kind, tensors).to("meta", getattr(torch, layer.dtype))


def meta_tokens(layer: LayerConfig, batch: int, heads: int, tokens: int) -> Tensor:
    """[B, heads, S, D] in the layer's dtype."""
    shape = (batch, heads, tokens, layer.head_dim)
    return torch.empty(shape, dtype=getattr(torch, layer.dtype), device="meta")


def meta_step(
    layer: LayerConfig,
    batch: int,
    maps: LayerMaps | None,
    *,
    masked: bool,
    pooled: bool = False,
    splits: int | None = None,
) -> LayerArrays:
    """Make one decode step of `batch` sequences; use it within `launch.recording`.

    Parameters
    ----------
    layer, maps
        From `meta_maps`.
    batch
        B.
    masked
        Whether a mask is given.
    pooled
        Whether the sequences' rows in the arrays are given.
    splits
        As `step` has it.

    Returns
    -------
    LayerArrays
        The cache.
    """
    arrays = empty_arrays(layer, batch, device="meta")
    q = meta_tokens(layer, batch, layer.query_heads, 1)
    k = meta_tokens(layer, batch, layer.kv_heads, 1)
    mask = torch.ones(batch, 1, dtype=torch.bool, device="meta") if masked else None
    numbers = torch.empty(batch, dtype=torch.int32, device="meta")
    rows = numbers if pooled else None
    step(layer, arrays, maps, q, k, k, lengths=numbers, rows=rows, mask=mask, splits=splits)
    return arrays
