"""Codes as numbers to multiply with, a few operators for all pairs of a layer.

A field is some bits of one byte: a code, or a part of one whose other bits lie in another plane.
Masked out but not shifted, it is its share of the code times a power of two, and that factor goes
into the queries, or comes out of the sums over values: an exact and small product. What is left to
do for every pair is to copy bytes, mask them, and convert them.

Fields are rows here and pairs columns, for then each operator runs over long pieces of memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...quantization import CodeLayout, codes


@dataclass(frozen=True)
class Fields:
    """The fields of a layout, E - 1 of them, and a row of ones for the codes' centers.

    All numbers here are small integers over powers of two: sums of their products are exact.

    Parameters
    ----------
    byte
        [E - 1] int64, where each field lies in a pair's bytes; ``None``: byte i is field i.
    mask
        [E - 1, 1] uint8, its bits there.
    matrix
        [D, E]: ``(code - center)[channel] = Σ matrix[channel, e] field[e]``.
    channel, shift, low_mask
        [E - 1]: field e is ``(code[channel[e]] >> shift[e]) & low_mask[e]``, at the lowest bits.
    places
        [E - 1, nbytes], what such fields count for in each byte.
    grid
        [stored] each, the layout's steps, centers and highest codes.
    """

    byte: Tensor | None
    mask: Tensor
    matrix: Tensor
    channel: Tensor
    shift: Tensor
    low_mask: Tensor
    places: Tensor
    grid: tuple[Tensor, Tensor, Tensor]

    def encode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """As `codes.encode` of [..., D], in the matrix' dtype."""
        found, scales = codes.quantise(u[..., : len(self.grid[0])], *self.grid)
        found = found.index_select(found.ndim - 1, self.channel)
        found = found.bitwise_right_shift_(self.shift).bitwise_and_(self.low_mask)
        return (found.to(self.places.dtype) @ self.places).to(torch.uint8), scales

    def decode(self, packed: Tensor, scales: Tensor) -> Tensor:
        """As `codes.decode` of [..., nbytes], for a few pairs: [..., D] in the matrix' dtype."""
        if self.byte is not None:
            packed = packed.index_select(packed.ndim - 1, self.byte).bitwise_and_(self.mask[:, 0])
        found = packed.to(self.matrix.dtype) @ self.matrix[:, :-1].T + self.matrix[:, -1]
        return found.mul_(scales.to(found.dtype).unsqueeze(-1))

    def rows(self, packed: Tensor) -> Tensor:
        """The fields of bytes [..., n, nbytes], in the matrix' dtype: [..., E, n]."""
        found = packed.transpose(-1, -2).contiguous()
        if self.byte is not None:
            found = found.index_select(found.ndim - 2, self.byte).bitwise_and_(self.mask)
        count = self.matrix.shape[1]
        rows = self.matrix.new_empty((*found.shape[:-2], count, found.shape[-1]))
        rows[..., :-1, :].copy_(found)
        rows[..., -1, :].fill_(1)
        return rows


@functools.lru_cache(maxsize=256)
def fields_of(layout: CodeLayout, dtype: torch.dtype, device: torch.device) -> Fields:
    """The fields of a layout, for products in that dtype."""
    byte, mask, channels, shifts, low_masks, weights = [], [], [], [], [], []
    for plane in layout.planes:
        highest = 2**plane.width - 1
        for index in range(plane.channels):
            field, offset = divmod(index, plane.nbytes)
            low = field * plane.width
            byte.append(plane.offset + offset)
            mask.append(highest << low)
            channels.append(plane.first + index)
            shifts.append(plane.shift)
            low_masks.append(highest)
            weights.append(2.0 ** (plane.shift - low))
    count, stored = len(byte), layout.stored
    fields = np.arange(count)
    matrix = np.zeros((len(layout.bits), count + 1))
    matrix[channels, fields] = weights
    matrix[:stored, -1] = -layout.centers[:stored]
    places = np.zeros((count, layout.nbytes))
    # The lowest bit of a field in its byte.
    places[fields, byte] = [bits & -bits for bits in mask]
    whole = byte == [*range(layout.nbytes)] and set(mask) == {255}
    numbers = functools.partial(torch.tensor, dtype=dtype, device=device)
    small = functools.partial(torch.tensor, dtype=torch.uint8, device=device)
    return Fields(
        None if whole else torch.tensor(byte, device=device),
        small(mask).unsqueeze(1),
        numbers(matrix),
        torch.tensor(channels, device=device),
        small(shifts),
        small(low_masks),
        numbers(places),
        (
            numbers(layout.steps[:stored]),
            numbers(layout.centers[:stored]),
            numbers(layout.highest[:stored]),
        ),
    )
