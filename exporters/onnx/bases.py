"""The bases of codes at the edges of each layer's attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from less_cache.layer_maps import LayerMaps
from less_cache.quantization.transforms import (
    TENSORS,
    LayerTransforms,
    Transforms,
    layer_transforms,
)

from .heads import ModelLayer
from .parts import is_shifted


class Bases(nn.Module):
    """Into the basis of each quantised layer's codes, and back; other layers are left alone.

    Parameters
    ----------
    layers
        The model's.
    transforms
        The calibrated bases of the layers that have some, in order.
    """

    def __init__(self, layers: list[ModelLayer], transforms: Transforms | None) -> None:
        super().__init__()
        given = (own for own in transforms or () if own is not None)
        self._layers: dict[int, LayerTransforms] = {}
        # A module sees parameters only in lists of its own, and a rotation that all heads share
        # is held once.
        self._held = nn.ParameterList()
        shared: LayerTransforms | None = None
        for layer in layers:
            config = layer.config
            if config.quantization is None:
                continue
            calibrated = config.quantization.transform == "calibrated"
            basis = layer_transforms(config, next(given) if calibrated else None)
            if basis is None:
                raise AssertionError(f"layer {layer.index}: quantised without a basis")
            if not calibrated:
                shared = shared or self._taken(basis.heads(slice(1)))
                self._layers[layer.index] = shared
                continue
            if basis.key_mean is None and is_shifted(config, layer.kind):
                # The node of a calibrated layer always has a shift.
                basis = dataclasses.replace(basis, key_mean=torch.zeros_like(basis.key_in[:, 0]))
            self._layers[layer.index] = self._taken(basis)

    def _taken(self, basis: LayerTransforms) -> LayerTransforms:
        held = {}
        for name in TENSORS:
            tensor = getattr(basis, name)
            if tensor is not None:
                held[name] = nn.Parameter(tensor.float(), requires_grad=False)
        self._held.extend(held.values())
        return dataclasses.replace(basis, **held)

    def fold(self, layer: ModelLayer, maps: LayerMaps) -> LayerMaps:
        """A layer's maps for what `enter` gives."""
        basis = self._layers.get(layer.index)
        if basis is None:
            return maps.to("cpu", getattr(torch, layer.config.dtype))
        return basis.fold(maps.to("cpu", torch.float32))

    def enter(
        self, index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `LayerTransforms.enter`; of layer `index`."""
        basis = self._layers.get(index)
        return (q, k, v, None) if basis is None else basis.enter(q, k, v)

    def leave(self, index: int, out: Tensor, mask: Tensor) -> Tensor:
        """See `LayerTransforms.leave`; of layer `index`, zero where `mask` [B, S] is."""
        basis = self._layers.get(index)
        if basis is None:
            return out
        out = basis.leave(out)
        if basis.value_mean is None:
            return out
        return out.masked_fill((mask == 0).unsqueeze(1).unsqueeze(3), 0)
