"""`TensorRTState`: what a model holds between calls, as tensors on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporters.onnx.manifest import Manifest
from exporters.onnx.snapshots import to_cache_state
from less_cache._checks import check_int
from less_cache.state import EMPTY


class TensorRTState:
    """The state of a batch of sequences; `TensorRTDecoder.new_state` makes one.

    Attributes
    ----------
    manifest : Manifest
        Of the model it belongs to.
    arrays : dict of str to Tensor
        By name: ``length`` [B], ``{i}.keys`` [B, Hkv, C, D], and so on; see the manifest. Read it
        anew after each call: the decoder keeps the state that it works on in buffers of its own.
    tokens_bound : int
        No sequence has seen more tokens than this.
    """

    def __init__(self, manifest: Manifest, arrays: dict[str, Tensor]) -> None:
        self.manifest = manifest
        self.arrays = arrays
        self.tokens_bound = int(self.lengths().max())

    def __repr__(self) -> str:
        return f"TensorRTState(batch_size={self.batch_size}, nbytes={self.nbytes})"

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.arrays["length"].shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: the manifest's ``bytes_per_sequence`` times the batch size."""
        return self.manifest.bytes_per_sequence * self.batch_size

    def lengths(self) -> np.ndarray:
        """[B] int32, tokens seen."""
        return self.arrays["length"].cpu().numpy()

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of all arrays; bfloat16, which NumPy has not, as float32."""
        return {name: to_numpy(tensor).copy() for name, tensor in self.arrays.items()}

    def select(self, rows: Sequence[int]) -> TensorRTState:
        """A new state of the given rows, in that order; repeats allowed.

        Parameters
        ----------
        rows
            [N] integers in 0 .. B - 1, at least one.

        Raises
        ------
        TypeError, ValueError
            If `rows` is not of that kind.
        """
        index = np.asarray(rows)
        if index.ndim != 1 or index.size == 0:
            raise ValueError(f"rows: got shape {index.shape}, expected one dimension, not empty")
        if index.dtype.kind not in "iu":
            raise TypeError(f"rows: got dtype {index.dtype}, expected integers")
        if index.min() < 0 or index.max() >= self.batch_size:
            raise ValueError(
                f"rows: got rows {index.min()} to {index.max()}, "
                f"expected 0 to {self.batch_size - 1}"
            )
        taken = torch.from_numpy(index.astype(np.int64)).to(self.arrays["length"].device)
        return TensorRTState(self.manifest, {n: x[taken] for n, x in self.arrays.items()})

    @staticmethod
    def concat(states: Sequence[TensorRTState]) -> TensorRTState:
        """A new state of all rows of `states`, in order.

        Parameters
        ----------
        states
            At least one, all of the same exported model.

        Raises
        ------
        ValueError
            If there is none, or they belong to different models.
        """
        if not states:
            raise ValueError("states: got none, expected at least one")
        first = states[0]
        for i, state in enumerate(states):
            if state.manifest.data["files"] != first.manifest.data["files"]:
                raise ValueError(f"states[{i}]: belongs to another exported model than states[0]")
        arrays = {name: torch.cat([s.arrays[name] for s in states]) for name in first.arrays}
        return TensorRTState(first.manifest, arrays)

    def save(self, path: str | Path) -> None:
        """Write a snapshot, which `OnnxDecoder` and `less_cache.CacheState` read as well.

        Raises
        ------
        ValueError
            If the model has sliding-window layers, which such a snapshot has no place for.
        """
        arrays = {name: tensor.cpu() for name, tensor in self.arrays.items()}
        to_cache_state(self.manifest, arrays, self.tokens_bound).save(Path(path))


def empty_arrays(manifest: Manifest, batch_size: int) -> dict[str, Tensor]:
    """The arrays of sequences that have seen nothing, on the CPU.

    Raises
    ------
    TypeError, ValueError
        If the size is no positive integer.
    """
    check_int("batch_size", batch_size, minimum=1)
    arrays = {}
    for spec in manifest.state:
        fill = EMPTY if spec.name.endswith(".positions") else 0
        shape = (batch_size, *spec.shape)
        arrays[spec.name] = torch.full(shape, fill, dtype=getattr(torch, spec.dtype))
    return arrays


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU, as NumPy can have it."""
    tensor = tensor.cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
