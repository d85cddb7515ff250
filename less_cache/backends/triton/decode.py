"""A decode step: kernel A, kernel B, and a third where one head's slots are shared out.

Nothing here waits for the device or depends on what it holds, so that a whole model's step can be
captured in one CUDA graph; replaying it allocates nothing. Kernels are compiled for a model, not
for a batch, a capacity or a token: whatever differs by these is a number that they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...arrays import PAGE_ALIGNMENT, LayerArrays
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ...policies import Gain
from . import launch as launching
from .heads import head_table
from .kernels.attend import attend, conclude_split
from .kernels.maths import EXP, NO_MAPS, PAPER
from .kernels.planes import codes_text
from .kernels.select_maps import select_and_map
from .launch import block, contiguous_heads, dot_type, launch

KINDS = {"paper": PAPER.value, "exp": EXP.value}

TILE_BYTES = 8192
"""Of keys, and of values, that one program reads at a time."""

CODED_TILE_BYTES = {2: 16384, 4: 8192}
"""The same of codes once they are unpacked, by the bytes of a number: too few to spill."""

ALL_REGISTERS = 255
"""As many as there are: where the assembler, left alone, would spill some."""

STAGES = 3
"""Turns of a loop, of which two have their loads under way while one is computed."""

BLOCKS_A_SPLIT = 4
"""Blocks of slots below which sharing them out costs more than it gains."""

PROGRAMS_A_PROCESSOR = 4
"""Programs of kernel B that a multiprocessor has room for, and that heads are shared out for."""

MOST_SPLITS = 16
"""Programs a head: what they leave is merged one after another."""

SLOTS_A_TILE = {1: 256, 16: 128, 32: 32}
"""Slots that kernel A looks at at a time, by the sequences of a program: none too many to spill."""

SCORES_A_THREAD = 2
"""Slots whose scores a thread of kernel B updates at a time."""

SCORES_AT_THE_END = 8
"""The same of `conclude_split`, which has registers to spare and many slots to go through."""

ALIGNED_ARRAYS = ("keys", "values", "H")
"""Arrays that are read a vector at a time."""


@dataclass(frozen=True)
class Tiles:
    """How much of what one program of kernel B holds at a time."""

    group: int
    head_dim: int
    rank: int
    slots: int
    splits: int
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
    batch, device = k.shape[0], k.device
    tile = tiles(layer, batch, launching.processors(device), splits)
    q, k, v = (contiguous_heads(array) for array in (q, k, v))
    heads = (batch, layer.kv_heads)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    slots = scratch(*heads, dtype=torch.int32)
    phi = scratch(batch, layer.query_heads, layer.rank)
    psi = scratch(*heads, layer.rank)
    strides, aligned = row_strides(arrays)
    call: dict[str, Any] = {
        "rows": None if rows is None else rows.contiguous(),
        "lengths": lengths.contiguous(),
        "heads": head_table(layer, device),
        "capacity": layer.capacities[0],
    }
    _select_and_map(layer, arrays, maps, q, call, strides, aligned, slots, phi, psi)

    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    split = tile.splits > 1
    coded = layer.key_layout is not None
    parts = (*heads, tile.splits, tile.group)
    scored = layer.policy.gains is not Gain.NONE
    arguments: dict[str, Any] = {
        **call,
        "q": q,
        "k": k,
        "v": v,
        "mask": None if mask is None else mask.view(torch.uint8),
        "keys": arrays.keys,
        "values": arrays.values,
        "key_scales": arrays.key_scales,
        "value_scales": arrays.value_scales,
        "scores": arrays.scores,
        "positions": arrays.positions,
        "history": arrays.history,
        "H": arrays.H,
        "z": arrays.z,
        "slots": slots,
        "phi": phi if layer.rank else None,
        "psi": psi if layer.rank else None,
        "shift": None if shift is None else shift.contiguous(),
        "logits": scratch(batch, layer.slots * layer.group) if scored else None,
        "out": out,
        "part_peak": scratch(*parts) if split else None,
        "part_mass": scratch(*parts) if split else None,
        "part_numerator": scratch(*parts, tile.head_dim) if split or coded else None,
        "splits": tile.splits,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "k_row_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "v_row_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "mask_stride": 0 if mask is None else mask.stride(0),
        **strides,
        "logits_row_stride": layer.slots * layer.group,
    }
    shared: dict[str, Any] = {
        **codes_constants(layer),
        "HAS_MASK": mask is not None,
        **policy_constants(layer),
        "GROUP": layer.group,
        "SINGLE": layer.group == 1,
        "KV_HEADS": layer.kv_heads,
        "HEAD_DIM": layer.head_dim,
        "RANK": layer.rank,
        "ALIGNED": aligned,
        "BLOCK_G": tile.group,
        "BLOCK_D": tile.head_dim,
        "BLOCK_R": tile.rank,
        "BLOCK_S": SCORES_A_THREAD * 32 * tile.warps,
    }
    constants = {
        **shared,
        "SPLIT": split,
        "BLOCK_C": tile.slots,
        "DOT": products_type(layer),
    }
    programs = batch * layer.kv_heads
    grid = (programs, tile.splits)
    launch(
        attend,
        grid,
        arguments,
        constants,
        device=device,
        warps=tile.warps,
        stages=STAGES,
        registers=ALL_REGISTERS if coded or layer.dtype == "float32" else None,
    )
    if split:
        last = {**shared, "BLOCK_S": SCORES_AT_THE_END * 32 * tile.warps}
        launch(conclude_split, (programs,), arguments, last, device=device, warps=tile.warps)
    return out


def row_strides(arrays: LayerArrays) -> tuple[dict[str, int], bool]:
    """The kernels' strides between rows, and whether `ALIGNED_ARRAYS` begin each at 16 bytes.

    Where they do, their strides are counted in 16 bytes.
    """
    named = arrays.named()
    strides = {name: array.stride(0) for name, array in named.items()}
    widths = {name: PAGE_ALIGNMENT // named[name].itemsize for name in ALIGNED_ARRAYS}
    aligned = all(strides[name] % width == 0 for name, width in widths.items())
    if aligned:
        strides |= {name: strides[name] // width for name, width in widths.items()}
    for missing in ("history", "key_scales", "value_scales"):
        strides.setdefault(missing, 0)
    return {f"{name}_row_stride": stride for name, stride in strides.items()}, aligned


def products_type(layer: LayerConfig) -> Any:
    """The type of kernel B's products: codes are exact in float16, and queries better off there."""
    dtype = getattr(torch, layer.dtype)
    if layer.key_layout is not None and dtype.itemsize == 2:
        dtype = torch.float16
    return dot_type(dtype)


def codes_constants(layer: LayerConfig) -> dict[str, str]:
    """How pairs are coded, as compile-time constants."""
    return {
        "KEY_CODES": codes_text(layer.key_layout),
        "VALUE_CODES": codes_text(layer.value_layout),
    }


def policy_constants(layer: LayerConfig) -> dict[str, Any]:
    """The policy and the logits' scale as compile-time constants."""
    return {
        "START": int(layer.policy.starts),
        "GAIN": int(layer.policy.gains),
        "DECAY": float(layer.policy.decay),
        "WINDOW": layer.policy.history_window,
        "SCALE": layer.scale,
        "SOFTCAP": layer.softcap or 0.0,
    }


def _select_and_map(
    layer: LayerConfig,
    arrays: LayerArrays,
    maps: LayerMaps | None,
    q: Tensor,
    call: dict[str, Any],
    strides: dict[str, int],
    aligned: bool,
    slots: Tensor,
    phi: Tensor,
    psi: Tensor,
) -> None:
    batch = q.shape[0]
    weights: dict[str, Tensor] = {} if maps is None else dict(maps.tensors)
    names = (
        "phi_w1",
        "phi_w2",
        "psi_w1",
        "psi_b1",
        "psi_w2",
        "psi_w3",
        "psi_s1",
        "psi_s2",
        "psi_b",
    )
    read = ("keys", "key_scales", "scores", "positions")
    arguments = {
        **call,
        "q": q,
        **{name: getattr(arrays, name) for name in read},
        **{name: weights.get(name) for name in names},
        "slot_out": slots,
        "phi_out": phi,
        "psi_out": psi,
        "batch": batch,
        "sinks": layer.policy.sinks,
        "recent": layer.policy.protected_recent,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        **{f"{name}_row_stride": strides[f"{name}_row_stride"] for name in read},
    }
    sequences = 1 if maps is None else 16 if batch <= 16 else 32
    dtype = q.dtype if maps is None else weights["phi_w1"].dtype
    # A row of the first product is a hidden number: with as many as eight warps have, none repeats
    # another's; wider heads would take too much shared memory.
    most_hidden = 32 if dtype.itemsize == 4 else 128 if layer.head_dim <= 128 else 64
    constants = {
        "START": int(layer.policy.starts),
        "GAIN": int(layer.policy.gains),
        "KIND": NO_MAPS.value if maps is None else KINDS[maps.kind],
        "QUERY_HEADS": layer.query_heads,
        "KV_HEADS": layer.kv_heads,
        "KEY_CODES": codes_text(layer.key_layout),
        "HEAD_DIM": layer.head_dim,
        "HIDDEN": 0 if maps is None else maps.hidden,
        "RANK": layer.rank,
        "ALIGNED": aligned,
        "BLOCK_B": sequences,
        "BLOCK_C": SLOTS_A_TILE[sequences],
        "BLOCK_D": block(layer.head_dim),
        "BLOCK_H": most_hidden if maps is None else min(most_hidden, block(maps.hidden)),
        "BLOCK_R": block(layer.rank),
        "DOT": dot_type(dtype),
    }
    units = layer.kv_heads + (layer.query_heads if maps is not None else 0)
    grid = (units, triton.cdiv(batch, sequences))
    # By what the compiler reports: the fewest registers without spilling any.
    few = maps is None or (dtype.itemsize == 4 and layer.rank <= 32)
    launch(
        select_and_map,
        grid,
        arguments,
        constants,
        device=q.device,
        warps=4 if few else 8,
        stages=STAGES,
        registers=None if layer.key_layout is None else ALL_REGISTERS,
    )
