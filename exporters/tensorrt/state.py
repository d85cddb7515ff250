"""`TensorRTState`: what a model holds between calls, in tensors on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.common.batch_state import BatchState, empty_specs
from exporters.common.manifest import Manifest
from exporters.common.snapshots import to_cache_state


class TensorRTState(BatchState):
    """The state of a batch of sequences; `TensorRTDecoder.new_state` makes one.

    Attributes
    ----------
    manifest : Manifest
        That of the model it belongs to.
    arrays : dict of str to Tensor
        By name: ``length`` [B], ``{i}.keys`` [B, Hkv, C, D], and so on; see the manifest. Read it
        again after each call: the decoder moves the state that it works on into its own buffers.
    tokens_bound : int
        No sequence has seen more tokens than this.
    """

    def __init__(self, manifest: Manifest, arrays: dict[str, Tensor]) -> None:
        self.arrays = arrays
        super().__init__(manifest)

    @property
    def batch_size(self) -> int:
        return int(self.arrays["length"].shape[0])

    def lengths(self) -> np.ndarray:
        return self.arrays["length"].cpu().numpy()

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of all arrays; bfloat16 as float32, since NumPy does not have it."""
        return {name: to_numpy(tensor).copy() for name, tensor in self.arrays.items()}

    def save(self, path: str | Path) -> None:
        arrays = {name: tensor.cpu() for name, tensor in self.arrays.items()}
        to_cache_state(self.manifest, arrays, self.tokens_bound).save(Path(path))

    def _taken(self, index: np.ndarray) -> TensorRTState:
        rows = torch.from_numpy(index.astype(np.int64)).to(self.arrays["length"].device)
        return TensorRTState(self.manifest, {n: x[rows] for n, x in self.arrays.items()})

    def _joined(self, states: Sequence[TensorRTState]) -> TensorRTState:
        arrays = {name: torch.cat([s.arrays[name] for s in states]) for name in self.arrays}
        return TensorRTState(self.manifest, arrays)


def empty_arrays(manifest: Manifest, batch_size: int) -> dict[str, Tensor]:
    """The arrays of sequences that have seen nothing, on the CPU.

    Raises
    ------
    TypeError, ValueError
        If `batch_size` is not a positive integer.
    """
    return {
        spec.name: torch.full(shape, fill, dtype=getattr(torch, spec.dtype))
        for spec, shape, fill in empty_specs(manifest, batch_size)
    }


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a NumPy array on the CPU; bfloat16 becomes float32."""
    tensor = tensor.cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
