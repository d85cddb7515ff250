"""How kernels are launched, and how to see what would be launched without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1`` at import time)."""

UNKNOWN_PROCESSORS = 132
"""Multiprocessors where there is no device to ask: an H100's and H200's."""

ALL_REGISTERS = 255
"""As many as there are: where the assembler, left alone, would spill some."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: what the compiler needs to know of it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compiler's, by its names."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found if self.registers is None else {**found, "maxnreg": self.registers}


_recorder: ContextVar[list[Launch] | None] = ContextVar("_recorder", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it nothing runs: what would have been launched is put into the list it gives."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    device: torch.device,
    warps: int = 4,
    stages: int = 2,
    registers: int | None = None,
) -> Any:
    """Launch a kernel on a device's current stream, without waiting for it.

    Parameters
    ----------
    kernel
        A ``triton.jit`` function.
    grid
        Programs along x, y and z.
    arguments
        Tensors, integers and ``None``, by parameter name.
    constants
        Compile-time constants by parameter name.
    device
        Of the tensors; it need not be the current one.
    warps, stages
        Of each program; of its pipelined loops.
    registers
        At most so many a thread. Where nothing is said, the assembler may rather spill a few than
        let fewer programs share a multiprocessor.

    Returns
    -------
    CompiledKernel or None
        What Triton launched; ``None`` where nothing was compiled.
    """
    wanted = Launch(kernel, tuple(grid), arguments, constants, warps, stages, registers)
    launches = _recorder.get()
    if launches is not None:
        launches.append(wanted)
        return None
    with current(device):
        return kernel[wanted.grid](**arguments, **constants, **wanted.options)


def records() -> bool:
    """Whether launches are put into a list, and nothing runs."""
    return _recorder.get() is not None


_CURRENT_ALREADY: AbstractContextManager[Any] = nullcontext()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one: Triton launches on no other."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _CURRENT_ALREADY
    return torch.cuda.device(device)


def check_device(array: Tensor) -> None:
    """Refuse tensors that no kernel can reach.

    Raises
    ------
    ValueError
        If `array` is not on a CUDA device, and the interpreter is not on.
    """
    if array.is_cuda or INTERPRETED or _recorder.get() is not None:
        return
    raise ValueError(
        f"device: the state is on {str(array.device)!r}, but backend 'triton' runs on a CUDA GPU; "
        "elsewhere use backend 'torch'"
    )


def dot_type(dtype: torch.dtype) -> Any:
    """The type in which matrix products of such tensors are formed (sums are float32).

    The interpreter keeps bfloat16 as plain 16-bit words, and multiplies those.
    """
    if INTERPRETED and dtype == torch.bfloat16:
        return triton.language.float32
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the interpreter."""
    if device.type == "cuda":
        return _cuda_processors(device.index)
    return 1 if INTERPRETED else UNKNOWN_PROCESSORS


@lru_cache
def _cuda_processors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def block(size: int, least: int = 16) -> int:
    """The least power of two that is at least `size` and `least`."""
    return max(least, triton.next_power_of_2(size))


def contiguous_heads(array: Tensor) -> Tensor:
    """`array`, or a copy of it if the D numbers of a head do not lie side by side."""
    return array if array.stride(-1) == 1 else array.contiguous()
