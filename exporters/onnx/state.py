"""`OnnxState`: what an exported model holds between calls, as arrays that a session reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from less_cache._checks import check_int
from less_cache.state import EMPTY

from .manifest import Manifest

if TYPE_CHECKING:
    from .placement import Placement


class OnnxState:
    """The state of a batch of sequences; `OnnxDecoder.new_state` makes one.

    Attributes
    ----------
    manifest : Manifest
        Of the model it belongs to.
    arrays : dict of str to OrtValue
        By name: ``length`` [B], ``{i}.keys`` [B, Hkv, C, D], and so on; see the manifest.
    """

    def __init__(
        self, manifest: Manifest, placement: Placement, arrays: dict[str, ort.OrtValue]
    ) -> None:
        self.manifest = manifest
        self.placement = placement
        self.arrays = arrays
        # What a step's outputs that may not lie over its inputs are written to, in turn.
        self.spare: dict[str, ort.OrtValue] = {}
        # No sequence has seen more tokens than this.
        self.tokens_bound = int(self.lengths().max())

    def __repr__(self) -> str:
        return f"OnnxState(batch_size={self.batch_size}, nbytes={self.nbytes})"

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.arrays["length"].shape()[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: the manifest's ``bytes_per_sequence`` times the batch size."""
        return self.manifest.bytes_per_sequence * self.batch_size

    def lengths(self) -> np.ndarray:
        """[B] int32, tokens seen."""
        return self.arrays["length"].numpy()

    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of all arrays."""
        return {name: np.array(value.numpy()) for name, value in self.arrays.items()}

    def select(self, rows: Sequence[int]) -> OnnxState:
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
        return self._of({name: value.numpy()[index] for name, value in self.arrays.items()})

    @staticmethod
    def concat(states: Sequence[OnnxState]) -> OnnxState:
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
        return first._of(
            {
                name: np.concatenate([state.arrays[name].numpy() for state in states])
                for name in first.arrays
            }
        )

    def save(self, path: str | Path) -> None:
        """Write a snapshot, which `OnnxDecoder.load_state` and `less_cache.CacheState` read.

        Raises
        ------
        ValueError
            If the model has sliding-window layers, which such a snapshot has no place for.
        """
        from .snapshots import save_state

        save_state(self, Path(path))

    def _of(self, arrays: dict[str, np.ndarray]) -> OnnxState:
        placed = {name: self.placement.put(array) for name, array in arrays.items()}
        return OnnxState(self.manifest, self.placement, placed)


def empty_state(manifest: Manifest, placement: Placement, batch_size: int) -> OnnxState:
    """The state of `batch_size` sequences that have seen nothing.

    Raises
    ------
    TypeError, ValueError
        If the size is no positive integer.
    """
    check_int("batch_size", batch_size, minimum=1)
    arrays: dict[str, Any] = {}
    for spec in manifest.state:
        fill = EMPTY if spec.name.endswith(".positions") else 0
        array = np.full((batch_size, *spec.shape), fill, dtype=spec.dtype)
        arrays[spec.name] = placement.put(array)
    return OnnxState(manifest, placement, arrays)
