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

import torch
from torch import Tensor

from ...quantization import CodeLayout


@dataclass(frozen=True)
class Fields:
    """The fields of a layout, E - 1 of them, and a row of ones for the codes' centers.

    Parameters
    ----------
    byte
        [E - 1] int64, where each field lies in a pair's bytes; ``None``: byte i is field i.
    mask
        [E - 1, 1] uint8, its bits there.
    matrix
        [D, E]: ``(code - center)[channel] = Σ matrix[channel, e] field[e]``.
    """

    byte: Tensor | None
    mask: Tensor
    matrix: Tensor

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
    byte, mask, place = [], [], []
    for plane in layout.planes:
        for channel in range(plane.channels):
            field, offset = divmod(channel, plane.nbytes)
            low = field * plane.width
            byte.append(plane.offset + offset)
            mask.append((2**plane.width - 1) << low)
            place.append((plane.first + channel, 2.0 ** (plane.shift - low)))
    matrix = torch.zeros(len(layout.bits), len(byte) + 1, dtype=torch.float64)
    for column, (channel, weight) in enumerate(place):
        matrix[channel, column] = weight
    matrix[: layout.stored, -1] = -torch.from_numpy(layout.centers[: layout.stored])
    whole = byte == [*range(layout.nbytes)] and set(mask) == {255}
    return Fields(
        None if whole else torch.tensor(byte, device=device),
        torch.tensor(mask, dtype=torch.uint8, device=device).unsqueeze(1),
        matrix.to(device, dtype),
    )
