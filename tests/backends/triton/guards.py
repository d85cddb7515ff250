"""Buffers with guard words around them, and poison inside: nothing missed, nothing overrun."""

from __future__ import annotations

import dataclasses

import torch

from less_cache.arrays import LayerArrays

GUARD = 64
POISON = {torch.int32: -(2**30), torch.int64: -(2**60), torch.uint8: 255}


class Guards:
    """Makes tensors that lie in larger buffers, and says whether their surroundings changed."""

    def __init__(self) -> None:
        self.buffers = []

    def empty(self, *shape, dtype=torch.float32, device=None):
        """As `torch.empty`: a tensor full of poison, a guard on each side."""
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        size = torch.Size(shape).numel()
        poison = POISON.get(dtype, float("nan"))
        buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def copy(self, tensor):
        guarded = self.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return guarded.copy_(tensor)

    def arrays(self, arrays: LayerArrays) -> LayerArrays:
        """A copy of a layer's arrays, each of them guarded."""
        copies = {name: self.copy(array) for name, array in arrays.named().items()}
        return dataclasses.replace(arrays, **copies)

    def check(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            for guard in (buffer[:GUARD], buffer[-GUARD:]):
                poison = POISON.get(buffer.dtype)
                assert bool(guard.isnan().all() if poison is None else (guard == poison).all())
