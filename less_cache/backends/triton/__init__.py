"""The GPU backend: a decode step is two kernels a layer, the arrays updated in place.

Needs Triton (the extra ``triton``) and a CUDA device; the same kernels run on the
CPU under Triton's interpreter, which is how they are tested without one. What Triton compiles is in
`kernels`, the tools that compile it ahead of time in `aot`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...arrays import LayerArrays
from ...config import CacheConfig
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps

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
from .maps import prepare_maps
from .scan import eviction_times

__all__ = ["attend", "check_config", "eviction_times", "prepare_maps"]

LARGEST_HEAD = 256
LARGEST_RANK = 64


def check_config(config: CacheConfig) -> None:
    """Refuse what the kernels were not made for.

    Raises
    ------
    ValueError
        If a layer's policy is a user's own, a head or the rank too large, or the dtype float64.
    """
    for i, policy in enumerate(config.policies):
        if policy.custom:
            raise ValueError(
                f"policy: layer {i} has {policy}, whose scores are Python code, but backend "
                "'triton' has kernels for tables alone; use 'torch' or 'reference'"
            )
    for name, size, largest in (
        ("head_dim", config.head_dim, LARGEST_HEAD),
        ("rank", max(config.ranks), LARGEST_RANK),
    ):
        if size > largest:
            raise ValueError(f"{name}: got {size}, but backend 'triton' takes at most {largest}")
    for name in ("dtype", "state_dtype"):
        if getattr(config, name) == "float64":
            raise ValueError(f"{name}: got 'float64', which backend 'triton' does not compute in")


def attend(
    layer: LayerConfig,
    arrays: LayerArrays,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    clean: bool = False,
    shift: Tensor | None = None,
) -> Tensor:
    """The step; see `Backend.attend`. Rows may lie anywhere, but each in one piece.

    Raises
    ------
    ValueError
        If the arrays are on no GPU, or what one row holds of an array is not in one piece.
    """
    check_device(arrays.keys)
    check_rows(arrays)
    given: dict[str, Any] = {"lengths": lengths, "rows": rows, "mask": mask, "shift": shift}
    with torch.no_grad():
        if k.shape[2] == 1:
            # An empty row costs a step nothing, clean or not.
            return step(layer, arrays, maps, q, k, v, **given)
        return chunk.attend(layer, arrays, maps, q, k, v, **given, clean=clean)


def check_rows(arrays: LayerArrays) -> None:
    """Refuse arrays whose rows the kernels cannot read: they know one stride, between rows.

    Raises
    ------
    ValueError
        If what one row holds of an array is not in one piece.
    """
    for name, array in arrays.named().items():
        if array.is_contiguous():
            continue
        if array.shape[0] and not array[0].is_contiguous():
            raise ValueError(
                f"{name}: has strides {array.stride()} for shape {tuple(array.shape)}, but backend "
                "'triton' reads arrays whose rows are in one piece each"
            )
