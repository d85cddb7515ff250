"""A decode step: kernel A, in one launch or two, kernel B, and one more where slots are shared out.

Nothing here waits for the device or depends on what it holds, so that a whole model's step can be
captured in one CUDA graph; replaying it allocates nothing. Kernels are compiled for a model, not
for a batch, a capacity or a token: whatever differs by these is a number that they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...arrays import ARRAYS, LayerArrays
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from . import launch as launching
from .heads import head_table
from .launch import contiguous_heads
from .plans import WEIGHTS, StepLaunches, row_strides
from .ready import all_aligned
from .tiles import tiles


def step(
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
    shift: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """`Backend.attend` for one new token (S = 1).

    Parameters
    ----------
    layer, arrays, maps, q, k, v, lengths, rows, mask, shift
        As `Backend.attend` has them.
    splits
        Programs that share one head's slots; default: as many as fill the device.

    Returns
    -------
    Tensor
        [B, Hq, 1, D].
    """
    device = k.device
    q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
    weights: Mapping[str, Tensor] = {} if maps is None else maps.tensors
    stored = [getattr(arrays, name) for name in ARRAYS]
    count = launching.processors(device)
    strides = [None if array is None else array.stride(0) for array in stored]
    key = (
        # The plan keeps the layer, and no other object has its number until then.
        id(layer),
        None if maps is None else (maps.kind, maps.hidden, weights["phi_w1"].dtype),
        device,
        count,
        splits,
        *((x.dtype, x.stride()) for x in (q, k, v)),
        q.shape[0],
        *strides,
        lengths.dtype,
        None if rows is None else rows.dtype,
        None if mask is None else mask.stride(0),
        None if shift is None else shift.dtype,
    )
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        by_name = dict(zip(ARRAYS, strides, strict=True))
        _, aligned = row_strides(layer, by_name)
        tile = tiles(layer, q.shape[0], count, splits, aligned=aligned)
        plan = StepLaunches(layer, maps, q, k, v, mask, by_name, tile)
        _PLANS[key] = plan
    given: dict[str, Tensor | None] = {name: weights.get(name) for name in WEIGHTS}
    given.update(zip(ARRAYS, stored, strict=True))
    given["q"], given["k"], given["v"] = q, k, v
    given["shift"] = None if shift is None else shift.contiguous()
    for name, (shape, dtype) in plan.scratch.items():
        given[name] = torch.empty(shape, dtype=dtype, device=device)
    aligned = all_aligned(given.values())
    # Of the others no kernel wants to know how they are aligned.
    given["rows"] = None if rows is None else rows.contiguous()
    given["lengths"] = lengths.contiguous()
    given["mask"] = None if mask is None else mask.view(torch.uint8)
    given["heads"] = head_table(layer, device)
    return plan.run(given, aligned=aligned, device=device)


MOST_PLANS = 4096
"""Plans that are kept: one a layer, batch and kind of call."""

_PLANS: dict[Any, StepLaunches] = {}
