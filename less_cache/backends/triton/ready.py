"""Launches of which all but the tensors is known.

Triton looks at the type, the alignment and the value of each of some sixty arguments to find the
compiled kernel of a call. Of a step's calls all are alike but for the tensors' alignment: the
kernel is found once, and called from then on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch as launching
from .launch import launch, records

ALIGNMENT = 16
"""Bytes: Triton compiles a kernel of its own for pointers that are multiples of it."""


class ReadyLaunch:
    """A kernel with its grid, numbers and constants, to be called with tensors.

    Parameters
    ----------
    kernel, grid, constants, warps, stages, registers
        As of `launch`.
    tensors
        The parameters that a call gives: each time of the same dtype, or ``None`` each time.
    numbers
        The other arguments.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        tensors: Iterable[str],
        numbers: Mapping[str, int],
        constants: Mapping[str, Any],
        *,
        warps: int,
        stages: int = 2,
        registers: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.grid = tuple(grid)
        self.tensors = tuple(tensors)
        self.numbers = dict(numbers)
        self.constants = dict(constants)
        self.options: dict[str, Any] = {"warps": warps, "stages": stages, "registers": registers}
        self._fixed = {**self.numbers, **self.constants}
        self._in_order = operator.itemgetter(*kernel.arg_names)
        self._compiled: Callable[..., Any] | None = None

    def __call__(
        self, given: Mapping[str, Tensor | None], *, aligned: bool, device: torch.device
    ) -> None:
        """Launch it on the current stream of `device`.

        Parameters
        ----------
        given
            At least `tensors`, by name.
        aligned
            Whether all of them begin at multiples of `ALIGNMENT` bytes.
        device
            Of the tensors, and the current one unless it is no CUDA device.
        """
        # Another kernel is needed for other alignments: Triton finds it.
        known = aligned and not records()
        if known and self._compiled is not None:
            self._compiled(*self._in_order({**self._fixed, **given}))
            return
        arguments = {name: given[name] for name in self.tensors} | self.numbers
        compiled = launch(
            self.kernel, self.grid, arguments, self.constants, device=device, **self.options
        )
        if known and not launching.INTERPRETED and compiled is not None:
            self._compiled = compiled[(*self.grid, 1, 1)[:3]]


def all_aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether each begins at a multiple of `ALIGNMENT` bytes; ``None`` does."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % ALIGNMENT == 0
