"""A decode step: kernel A, kernel B, and a third where one head's slots are shared out.

Nothing here waits for the device or depends on what it holds, so that a whole model's step can be
captured in one CUDA graph; replaying it allocates nothing. Kernels are compiled for a model, not
for a batch, a capacity or a token: whatever differs by these is a number that they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ...arrays import ARRAYS, LayerArrays
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from . import launch as launching
from .heads import head_table
from .launch import block, contiguous_heads
from .plans import WEIGHTS, StepLaunches, Tiles
from .ready import all_aligned

TILE_BYTES = 8192
"""Of keys, and of values, that one program reads at a time."""

CODED_TILE_BYTES = {2: 16384, 4: 8192}
"""The same of codes once they are unpacked, by the bytes of a number: too few to spill."""

BLOCKS_A_SPLIT = 4
"""Blocks of slots below which sharing them out costs more than it gains."""

PROGRAMS_A_PROCESSOR = 4
"""Programs of kernel B that a multiprocessor has room for, and that heads are shared out for."""

MOST_SPLITS = 16
"""Programs a head: what they leave is merged one after another."""


def tiles(layer: LayerConfig, batch: int, multiprocessors: int, splits: int | None = None) -> Tiles:
    """Tile sizes and the number of programs that share one head's slots.

    Parameters
    ----------
    layer
        Shapes and dtype.
    batch
        B.
    multiprocessors
        Of the device: `PROGRAMS_A_PROCESSOR` for each are wanted.
    splits
        Programs a head, instead of as many as the device wants.
    """
    group, head_dim = block(layer.group), block(layer.head_dim)
    # Small tiles and many programs a multiprocessor: more reads are under way at any time.
    itemsize = getattr(torch, layer.dtype).itemsize
    tile_bytes = TILE_BYTES if layer.key_layout is None else CODED_TILE_BYTES[itemsize]
    slots = tile_bytes // (head_dim * itemsize)
    if layer.key_layout is not None and group > 16:
        # The more queries, the more logits of each slot there are besides.
        slots //= group // 8
    slots = max(16, slots)
    blocks = triton.cdiv(max(layer.capacities), slots)
    most = 4096 if layer.key_layout is None else 2048
    large = group * head_dim > most or layer.rank > 16 or layer.dtype == "float32"
    if splits is None:
        wanted = PROGRAMS_A_PROCESSOR * multiprocessors // max(1, batch * layer.kv_heads)
        splits = max(1, min(wanted, blocks // BLOCKS_A_SPLIT, MOST_SPLITS))
    return Tiles(
        group=group,
        head_dim=head_dim,
        rank=block(layer.rank),
        slots=slots,
        # As many as have a block to read in the largest head.
        splits=triton.cdiv(blocks, triton.cdiv(blocks, min(splits, blocks))),
        warps=8 if large else 4,
    )


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
    row_strides = [None if array is None else array.stride(0) for array in stored]
    key = (
        # The plan keeps the layer, and no other object has its number until then.
        id(layer),
        None if maps is None else (maps.kind, maps.hidden, weights["phi_w1"].dtype),
        device,
        count,
        splits,
        *((x.dtype, x.stride()) for x in (q, k, v)),
        q.shape[0],
        *row_strides,
        lengths.dtype,
        None if rows is None else rows.dtype,
        None if mask is None else mask.stride(0),
        None if shift is None else shift.dtype,
    )
    plan = _PLANS.get(key)
    if plan is None:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        strides = dict(zip(ARRAYS, row_strides, strict=True))
        tile = tiles(layer, q.shape[0], count, splits)
        plan = StepLaunches(layer, maps, q, k, v, mask, strides, tile)
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
