"""Caches, maps and tokens without data, whose calls show what would be launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....arrays import LayerArrays, empty_arrays
from ....layer_config import LayerConfig
from ....layer_maps import LayerMaps, tensor_shapes
from ..decode import step
from ..maps import prepare_maps


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
    if has_means(layer):
        tensors["psi_b1"] = torch.empty(layer.kv_heads, hidden, device="meta")
    return prepare_maps(LayerMaps(kind, tensors), layer, "meta")


def has_means(layer: LayerConfig) -> bool:
    """Whether the layer's keys are centred: queries bring a shift, ψ a bias."""
    return layer.quantization is not None and layer.quantization.transform == "calibrated"


def meta_shift(layer: LayerConfig, batch: int, tokens: int) -> Tensor | None:
    """[B, Hq, S], where there is one."""
    if not has_means(layer):
        return None
    return torch.empty(batch, layer.query_heads, tokens, device="meta")


def meta_tokens(layer: LayerConfig, batch: int, heads: int, tokens: int) -> Tensor:
    """[B, heads, S, D] in the layer's dtype, or float32 in the basis of codes."""
    shape = (batch, heads, tokens, layer.head_dim)
    dtype = "float32" if layer.quantization is not None else layer.dtype
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


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
    given: dict[str, Any] = {"lengths": numbers, "rows": rows, "mask": mask}
    step(layer, arrays, maps, q, k, k, **given, shift=meta_shift(layer, batch, 1), splits=splits)
    return arrays
