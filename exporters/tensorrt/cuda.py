"""All that touches CUDA: memory, a stream, and captured graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def device_info(index: int) -> dict[str, Any]:
    """A GPU's name and compute capability.

    Raises
    ------
    RuntimeError
        If there is no such GPU.
    """
    if index < 0 or index >= torch.cuda.device_count():
        raise RuntimeError(f"device: got {index}, but {torch.cuda.device_count()} GPU(s) are there")
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": list(torch.cuda.get_device_capability(index)),
    }


def selected(index: int) -> contextlib.AbstractContextManager[None]:
    """Make a GPU the current one within the block: TensorRT builds for no other."""
    return torch.cuda.device(index)


class Device:
    """A GPU and the stream on which everything is done.

    Parameters
    ----------
    index
        The GPU's index.
    """

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)

    @property
    def handle(self) -> int:
        """The stream, as TensorRT takes it."""
        return self._stream.cuda_stream

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let PyTorch use the stream within the block, and wait for it at the end."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor there, its contents undefined."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def put(self, array: Tensor) -> Tensor:
        """A copy of `array` there, contiguous."""
        return self.empty(array.shape, array.dtype).copy_(array)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches on the stream; returns a function that launches it again.

        Nothing is computed meanwhile. The tensors must keep their addresses.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads (a tokenizer's, a server's) may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay
