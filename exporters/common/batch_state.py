"""What the states of all runtimes share: a batch of sequences that can be selected and joined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from less_cache._checks import check_int, check_rows
from less_cache.arrays import EMPTY

from .manifest import Manifest, TensorSpec

Own = TypeVar("Own", bound="BatchState")


class BatchState(ABC):
    """What a decoder holds between calls, for a batch of sequences.

    Attributes
    ----------
    manifest : Manifest
        That of the model it belongs to.
    arrays : dict
        The runtime's arrays by name: ``length`` [B], ``{i}.keys`` [B, Hkv, C, D], and so on; where
        a layer's heads differ in capacity, ``{i}.h{first}.keys`` of heads from `first` on. See the
        manifest.
    tokens_bound : int
        No sequence has seen more tokens than this.
    """

    arrays: Mapping[str, Any]

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.tokens_bound = int(self.lengths().max())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self.batch_size}, nbytes={self.nbytes})"

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """B."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: the manifest's ``bytes_per_sequence`` times the batch size."""
        return self.manifest.bytes_per_sequence * self.batch_size

    @abstractmethod
    def lengths(self) -> np.ndarray:
        """[B] int32, tokens seen."""

    @abstractmethod
    def numpy(self) -> dict[str, np.ndarray]:
        """Copies of all arrays."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a snapshot, for any runtime's ``load_state`` and for `less_cache.CacheState.load`.

        Raises
        ------
        ValueError
            If the model has sliding-window layers: a snapshot cannot hold them.
        """

    def select(self: Own, rows: Sequence[int]) -> Own:
        """A new state of the given rows, in that order; repeats allowed.

        Parameters
        ----------
        rows
            [N] integers in 0 .. B - 1, at least one.

        Raises
        ------
        TypeError, ValueError
            If `rows` is anything else.
        """
        return self._taken(check_rows("rows", rows, self.batch_size))

    @classmethod
    def concat(cls: type[Own], states: Sequence[Own]) -> Own:
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
        return first._joined(states)

    @abstractmethod
    def _taken(self: Own, index: np.ndarray) -> Own:
        """A state of the rows of `index`, all of which exist."""

    @abstractmethod
    def _joined(self: Own, states: Sequence[Own]) -> Own:
        """A state of all rows of `states`, all of which belong to this one's model."""


def empty_specs(
    manifest: Manifest, batch_size: int
) -> list[tuple[TensorSpec, tuple[int, ...], int]]:
    """For each array of a new state: its spec, its shape, and the number that fills it.

    Raises
    ------
    TypeError, ValueError
        If `batch_size` is not a positive integer.
    """
    check_int("batch_size", batch_size, minimum=1)
    return [
        (spec, (batch_size, *spec.shape), EMPTY if spec.name.endswith(".positions") else 0)
        for spec in manifest.state
    ]
