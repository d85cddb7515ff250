"""How much one program of kernel B reads at a time, and how many programs share a head's slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ...layer_config import LayerConfig
from .kernels.planes import codes_text, read_text
from .launch import block

TILE_BYTES = 8192
"""Of keys, and of values, that one program reads at a time."""

CODED_TILE_BYTES = {2: 16384, 4: 8192}
"""The same of codes once they are unpacked, by the bytes of a number: too few to spill."""

ASYNCHRONOUS = 4
"""Bytes, aligned to as many, that a thread copies into shared memory at a time, at least."""

BLOCKS_A_SPLIT = 4
"""Blocks of slots below which sharing them out costs more than it gains."""

PROGRAMS_A_PROCESSOR = 4
"""Programs of kernel B that a multiprocessor has room for, and that heads are shared out for."""

MOST_SPLITS = 16
"""Programs a head: what they leave is merged one after another."""


@dataclass(frozen=True)
class Tiles:
    """How much of what one program of kernel B holds at a time."""

    group: int
    head_dim: int
    rank: int
    slots: int
    splits: int
    warps: int
    ahead: bool
    """Whether the kernel loads codes a turn ahead: into registers, as the compiler would not."""


def tiles(
    layer: LayerConfig,
    batch: int,
    multiprocessors: int,
    splits: int | None = None,
    *,
    aligned: bool = True,
) -> Tiles:
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
    aligned
        Whether rows begin where vectors can be read.
    """
    group, head_dim = block(layer.group), block(layer.head_dim)
    coded = layer.key_layout is not None
    large = group * head_dim > (2048 if coded else 4096)
    warps = 8 if large or layer.rank > 16 or layer.dtype == "float32" else 4
    # Small tiles and many programs a multiprocessor: more reads are under way at any time.
    itemsize = getattr(torch, layer.dtype).itemsize
    slots = (CODED_TILE_BYTES[itemsize] if coded else TILE_BYTES) // (head_dim * itemsize)
    if coded and group > 16:
        # The more queries, the more logits of each slot there are besides.
        slots //= group // 8
    slots = max(16, slots)
    ahead = coded and not (aligned and asynchronous(layer, slots, warps))
    if ahead and layer.dtype != "float32":
        # Two tiles are in registers then; those of float32 are small enough as they are.
        slots = max(16, slots // 2)
    blocks = triton.cdiv(max(layer.capacities), slots)
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
        warps=warps,
        ahead=ahead,
    )


def asynchronous(layer: LayerConfig, slots: int, warps: int) -> bool:
    """Whether the compiler copies a tile's codes while the last one is in use."""
    for codes in (layer.key_layout, layer.value_layout):
        if codes is None:
            continue
        for part in read_text(codes_text(codes)):
            places = [codes.nbytes, part.low_offset, part.low_bytes]
            if part.high_width:
                places += [part.high_offset, part.high_bytes]
            few = slots * part.padded_bytes < ASYNCHRONOUS * 32 * warps
            if few or any(place % ASYNCHRONOUS for place in places):
                return False
    return True
