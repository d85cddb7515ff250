"""Feature maps as the kernels read them."""

from __future__ import annotations

from typing import Any

import torch

from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps


def prepare_maps(maps: LayerMaps, layer: LayerConfig, device: Any) -> LayerMaps:
    """The maps on the arrays' device in the model's dtype, each tensor in one piece."""
    dtype = getattr(torch, layer.dtype)
    placed = dict(maps.to(device, dtype).tensors)
    if "psi_b1" in placed:
        # It is added to a product in that dtype.
        placed["psi_b1"] = placed["psi_b1"].to(dtype)
    return LayerMaps(maps.kind, {name: t.contiguous() for name, t in placed.items()})
