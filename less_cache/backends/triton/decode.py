"""A decode step: kernel A, kernel B, and a third where one head's slots are shared out.

Nothing here waits for the device or depends on what it holds, so that a whole model's step can be
captured in one CUDA graph; replaying it allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...config import LayerConfig
from ...feature_maps import LayerMaps
from ...policies import Score
from ...state import LayerState
from . import launch as launching
from .attend import attend, conclude_split
from .launch import block, contiguous_heads, dot_type, launch
from .maths import EXP, NO_MAPS, PAPER
from .select_maps import select_and_map

KINDS = {"paper": PAPER.value, "exp": EXP.value}

SCORED = (Score.ATTENTION, Score.HISTORY)
"""Scores that are made of probabilities, and need every logit once more."""

TILE_BYTES = 8192
"""Of keys, and of values, that one program reads at a time."""

BLOCKS_A_SPLIT = 8
"""Blocks of slots below which sharing them out costs more than it gains."""


@dataclass(frozen=True)
class Tiles:
    """How much of what one program of kernel B holds at a time."""

    group: int
    head_dim: int
    rank: int
    slots: int
    splits: int
    span: int
    warps: int


def tiles(layer: LayerConfig, batch: int, multiprocessors: int, splits: int | None = None) -> Tiles:
    """Tile sizes and the number of programs that share one head's slots.

    Parameters
    ----------
    layer
        Shapes and dtype.
    batch
        B.
    multiprocessors
        Of the device: two programs for each are wanted.
    splits
        Programs a head, instead of as many as the device wants.
    """
    group, head_dim = block(layer.group), block(layer.head_dim)
    # Small tiles and many programs a multiprocessor: more reads are under way at any time.
    slots = max(16, TILE_BYTES // (head_dim * getattr(torch, layer.dtype).itemsize))
    blocks = triton.cdiv(layer.capacity, slots)
    large = group * head_dim > 4096 or layer.rank > 16 or layer.dtype == "float32"
    if splits is None:
        wanted = triton.cdiv(2 * multiprocessors, batch * layer.kv_heads)
        splits = max(1, min(wanted, blocks // BLOCKS_A_SPLIT))
    span = triton.cdiv(blocks, min(splits, blocks)) * slots
    return Tiles(
        group=group,
        head_dim=head_dim,
        rank=block(layer.rank),
        slots=slots,
        splits=triton.cdiv(layer.capacity, span),
        span=span,
        warps=8 if large else 4,
    )


def step(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    splits: int | None = None,
) -> Tensor:
    """`Backend.append` for one new token (S = 1).

    Parameters
    ----------
    layer, state, maps, q, k, v, mask
        As `Backend.append` has them.
    splits
        Programs that share one head's slots; default: as many as fill the device.

    Returns
    -------
    Tensor
        [B, Hq, 1, D].
    """
    batch = k.shape[0]
    tile = tiles(layer, batch, launching.processors(k.device), splits)
    q, k, v = (contiguous_heads(array) for array in (q, k, v))
    heads = (batch, layer.kv_heads)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=k.device)

    slots, seen = scratch(*heads, dtype=torch.int32), scratch(*heads, dtype=torch.int32)
    phi = scratch(batch, layer.query_heads, layer.rank)
    psi = scratch(*heads, layer.rank)
    _select_and_map(layer, state, maps, q, slots, seen, phi, psi)

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scored = layer.policy.score in SCORED
    parts = (*heads, tile.splits, tile.group)
    split = tile.splits > 1
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "mask": None if mask is None else mask.view(torch.uint8),
        **pointers(state),
        "slots": slots,
        "seen": seen,
        "phi": phi if layer.rank else None,
        "psi": psi if layer.rank else None,
        "logits": scratch(*heads, layer.group, layer.capacity) if scored else None,
        "out": out,
        "part_peak": scratch(*parts) if split else None,
        "part_mass": scratch(*parts) if split else None,
        "part_numerator": scratch(*parts, tile.head_dim) if split else None,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_row_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_row_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "mask_stride": 0 if mask is None else mask.stride(0),
    }
    shared: dict[str, Any] = {
        "HAS_MASK": mask is not None,
        **policy_constants(layer),
        "GROUP": layer.group,
        "SINGLE": layer.group == 1,
        "KV_HEADS": layer.kv_heads,
        "CAPACITY": layer.capacity,
        "HEAD_DIM": layer.head_dim,
        "RANK": layer.rank,
        "BLOCK_G": tile.group,
        "BLOCK_D": tile.head_dim,
        "BLOCK_R": tile.rank,
        "BLOCK_S": min(256, block(layer.capacity)),
    }
    own = {"SPLIT": split, "SPAN": tile.span, "BLOCK_C": tile.slots, "DOT": dot_type(k.dtype)}
    programs = batch * layer.kv_heads
    launch(attend, (programs, tile.splits), arguments, {**shared, **own}, warps=tile.warps)
    if split:
        constants = {**shared, "SPLITS": tile.splits}
        launch(conclude_split, (programs,), arguments, constants, warps=tile.warps)
    return out


def pointers(state: LayerState) -> dict[str, Tensor | None]:
    """The state's arrays by the kernels' parameter names."""
    names = ("keys", "values", "scores", "positions", "history", "H", "z", "length")
    return {name: getattr(state, name) for name in names}


def policy_constants(layer: LayerConfig) -> dict[str, Any]:
    """The policy and the logits' scale as compile-time constants."""
    return {
        "SCORE": int(layer.policy.score),
        "DECAY": float(layer.policy.decay),
        "WINDOW": layer.policy.history_window,
        "SCALE": layer.scale,
        "SOFTCAP": layer.softcap or 0.0,
    }


def _select_and_map(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    slots: Tensor,
    seen: Tensor,
    phi: Tensor,
    psi: Tensor,
) -> None:
    batch = q.shape[0]
    weights: dict[str, Tensor] = {} if maps is None else dict(maps.tensors)
    names = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2", "psi_b")
    arguments = {
        "q": q,
        "keys": state.keys,
        "scores": state.scores,
        "positions": state.positions,
        "length": state.length,
        **{name: weights.get(name) for name in names},
        "slot_out": slots,
        "seen_out": seen,
        "phi_out": phi,
        "psi_out": psi,
        "batch": batch,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
    }
    rows = 1 if maps is None else 16 if batch <= 16 else 32
    dtype = q.dtype if maps is None else weights["phi_w1"].dtype
    constants = {
        "SCORE": int(layer.policy.score),
        "SINKS": layer.policy.sinks,
        "RECENT": layer.policy.protected_recent,
        "KIND": NO_MAPS.value if maps is None else KINDS[maps.kind],
        "QUERY_HEADS": layer.query_heads,
        "KV_HEADS": layer.kv_heads,
        "CAPACITY": layer.capacity,
        "HEAD_DIM": layer.head_dim,
        "HIDDEN": 0 if maps is None else maps.hidden,
        "RANK": layer.rank,
        "BLOCK_B": rows,
        "BLOCK_C": min(block(layer.capacity), 1024 // rows),
        "BLOCK_D": block(layer.head_dim),
        "BLOCK_H": 64 if dtype.itemsize == 2 else 32,
        "BLOCK_R": block(layer.rank),
        "DOT": dot_type(dtype),
    }
    units = layer.kv_heads + (layer.query_heads if maps is not None else 0)
    grid = (units, triton.cdiv(batch, rows))
    # By what the compiler reports: the fewest registers without spilling any.
    few = maps is None or (dtype.itemsize == 4 and layer.rank <= 32)
    launch(select_and_map, grid, arguments, constants, warps=4 if few else 8)
