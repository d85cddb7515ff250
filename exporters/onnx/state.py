"""`OnnxState`: what an exported model holds between calls, in arrays that a session reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from exporters.common.batch_state import BatchState, empty_specs
from exporters.common.manifest import Manifest
from exporters.common.snapshots import read_arrays, to_cache_state

from .placement import Placement


class OnnxState(BatchState):
    """The state of a batch of sequences; `OnnxDecoder.new_state` makes one.

    Attributes
    ----------
    manifest : Manifest
        That of the model it belongs to.
    arrays : dict of str to OrtValue
        By name: ``length`` [B], ``{i}.keys`` [B, Hkv, C, D], and so on; see the manifest.
    """

    def __init__(
        self, manifest: Manifest, placement: Placement, arrays: dict[str, ort.OrtValue]
    ) -> None:
        self.placement = placement
        self.arrays = arrays
        # Buffers for those outputs of a step that must not overwrite its inputs; used in turn.
        self.spare: dict[str, ort.OrtValue] = {}
        super().__init__(manifest)

    @property
    def batch_size(self) -> int:
        return int(self.arrays["length"].shape()[0])

    def lengths(self) -> np.ndarray:
        return self.arrays["length"].numpy()

    def numpy(self) -> dict[str, np.ndarray]:
        return {name: np.array(value.numpy()) for name, value in self.arrays.items()}

    def save(self, path: str | Path) -> None:
        arrays = {name: torch.from_numpy(x.numpy()) for name, x in self.arrays.items()}
        to_cache_state(self.manifest, arrays, self.tokens_bound).save(Path(path))

    def _taken(self, index: np.ndarray) -> OnnxState:
        return self._of({name: value.numpy()[index] for name, value in self.arrays.items()})

    def _joined(self, states: Sequence[OnnxState]) -> OnnxState:
        return self._of(
            {
                name: np.concatenate([state.arrays[name].numpy() for state in states])
                for name in self.arrays
            }
        )

    def _of(self, arrays: dict[str, np.ndarray]) -> OnnxState:
        placed = {name: self.placement.put(array) for name, array in arrays.items()}
        return OnnxState(self.manifest, self.placement, placed)


def empty_state(manifest: Manifest, placement: Placement, batch_size: int) -> OnnxState:
    """The state of `batch_size` sequences that have seen nothing.

    Raises
    ------
    TypeError, ValueError
        If `batch_size` is not a positive integer.
    """
    arrays = {
        spec.name: placement.put(np.full(shape, fill, dtype=spec.dtype))
        for spec, shape, fill in empty_specs(manifest, batch_size)
    }
    return OnnxState(manifest, placement, arrays)


def read_state(manifest: Manifest, placement: Placement, path: Path) -> OnnxState:
    """The state of a snapshot.

    Raises
    ------
    FileNotFoundError, ValueError
        See `exporters.common.snapshots.read_arrays`.
    """
    arrays = read_arrays(manifest, path)
    return OnnxState(manifest, placement, {n: placement.put(a.numpy()) for n, a in arrays.items()})
