"""The GPU backend: a decode step is two kernels a layer, the state updated in place.

Needs Triton (``pip install less_cache[triton]``) and a CUDA device; the same kernels run on the
CPU under Triton's interpreter, which is how they are tested without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...config import CacheConfig, LayerConfig
from ...feature_maps import LayerMaps
from ...state import LayerState
from .. import torch_backend

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "backend 'triton' needs the package triton >= 3.6, which is not installed; "
        "install less_cache[triton], or use backend 'torch'"
    ) from error

from . import chunk
from .decode import step
from .launch import check_device
from .scan import eviction_times

__all__ = ["append", "check_config", "eviction_times", "prepare_maps"]

LARGEST_HEAD = 256
LARGEST_RANK = 64


def check_config(config: CacheConfig) -> None:
    """Refuse what the kernels were not made for.

    Raises
    ------
    ValueError
        If a layer's policy is a user's own, a head or the rank too large, or the dtype float64.
    """
    torch_backend.check_config(config)
    for name, size, largest in (
        ("head_dim", config.head_dim, LARGEST_HEAD),
        ("rank", config.rank, LARGEST_RANK),
    ):
        if size > largest:
            raise ValueError(f"{name}: got {size}, but backend 'triton' takes at most {largest}")
    for name in ("dtype", "state_dtype"):
        if getattr(config, name) == "float64":
            raise ValueError(f"{name}: got 'float64', which backend 'triton' does not compute in")


def prepare_maps(maps: LayerMaps, layer: LayerConfig, device: Any) -> LayerMaps:
    """The maps on the state's device, each tensor contiguous."""
    placed = torch_backend.prepare_maps(maps, layer, device)
    return LayerMaps(placed.kind, {name: t.contiguous() for name, t in placed.tensors.items()})


def append(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`CacheManager.append` for one layer; see `Backend.append`."""
    check_device(state.keys)
    with torch.no_grad():
        if k.shape[2] == 1:
            return step(layer, state, maps, q, k, v, mask)
        return chunk.append(layer, state, maps, q, k, v, mask)
