"""What a cache holds between calls: pairs, scores, positions and the low-rank state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._checks import check_int, check_rows
from .config import CacheConfig, LayerConfig
from .feature_maps import FeatureMaps, LayerMaps

Array = Any
"""A torch tensor, or a NumPy array where the state was made for NumPy."""

EMPTY = -1
"""The position of a slot that holds no pair."""


@dataclass
class LayerState:
    """One layer's cache. Its size never changes; backends rewrite the arrays in place.

    Parameters
    ----------
    keys, values
        [B, Hkv, C, D], keys after the rotary embedding.
    scores
        [B, Hkv, C], what the policy holds of each pair.
    positions
        [B, Hkv, C] int32, each pair's place in its sequence, counted without padding; -1: empty.
    H
        [B, Hkv, R, D], Σ ψ(k)ᵀ v over what was evicted.
    z
        [B, Hkv, R], Σ ψ(k) over what was evicted.
    length
        [B] int32, tokens seen.
    history
        [B, Hkv, C] int64, bits that `Scissorhands` keeps; ``None`` for other policies.
    tokens_bound
        No sequence has seen more tokens than this; known without asking the device.
    """

    keys: Array
    values: Array
    scores: Array
    positions: Array
    H: Array
    z: Array
    length: Array
    history: Array | None = None
    tokens_bound: int = 0

    def arrays(self) -> dict[str, Array]:
        """The arrays by name, `history` only where there is one."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: value
            for name, value in fields.items()
            if name != "tokens_bound" and value is not None
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in self.arrays().values())


class CacheState:
    """All layers' caches of one batch of sequences. Made by `CacheManager.init`.

    Attributes
    ----------
    config : CacheConfig
        With the dtype that the arrays have.
    layers : list of LayerState
    maps : FeatureMaps or None
        The maps the low-rank state was made with.
    """

    def __init__(
        self, config: CacheConfig, layers: list[LayerState], maps: FeatureMaps | None = None
    ) -> None:
        self.config = config
        self.layers = layers
        self.maps = maps
        # As the backend of that name wants them; the manager prepares them.
        self.layer_maps: list[LayerMaps | None] = [None] * len(layers)
        self.prepared_for: str | None = None

    def __repr__(self) -> str:
        first = self.layers[0]
        where = getattr(first.keys, "device", "numpy")
        return (
            f"CacheState(batch_size={self.batch_size}, num_layers={len(self.layers)}, "
            f"dtype={self.config.dtype!r}, device={str(where)!r}, nbytes={self.nbytes})"
        )

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.layers[0].keys.shape[0])

    @property
    def length(self) -> Array:
        """[B] int32, tokens seen; between layers of one step, as the last layer has it."""
        return self.layers[-1].length

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: ``config.bytes_per_sequence() * batch_size``."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def is_numpy(self) -> bool:
        """Whether the arrays are NumPy's rather than torch's."""
        return isinstance(self.layers[0].keys, np.ndarray)

    def reset(self) -> None:
        """Forget everything, in place."""
        for layer in self.layers:
            for name, array in layer.arrays().items():
                array[...] = EMPTY if name == "positions" else 0
            layer.tokens_bound = 0

    def reorder(self, rows: Any) -> None:
        """Row i becomes a copy of what row ``rows[i]`` was, in place: what beam search needs.

        Parameters
        ----------
        rows
            [B] integers in 0 .. B - 1, repeats allowed.

        Raises
        ------
        ValueError, TypeError
            If `rows` is not of that kind; nothing has changed then.
        """
        index = self._row_index("rows", rows)
        if len(index) != self.batch_size:
            raise ValueError(
                f"rows: got {len(index)} rows, expected batch_size = {self.batch_size}"
            )
        for layer in self.layers:
            for array in layer.arrays().values():
                # Indexing makes a copy first, so that overlapping rows are safe.
                array[...] = array[index]

    def select(self, rows: Any) -> CacheState:
        """A new state of the given rows, in that order; repeats allowed.

        Parameters
        ----------
        rows
            [N] integers in 0 .. B - 1.

        Raises
        ------
        ValueError, TypeError
            If `rows` is not of that kind.
        """
        index = self._row_index("rows", rows)
        layers = []
        for layer in self.layers:
            arrays = {name: array[index] for name, array in layer.arrays().items()}
            layers.append(LayerState(**arrays, tokens_bound=layer.tokens_bound))
        return self._like(layers)

    def repeat(self, count: int) -> CacheState:
        """A new state with each row `count` times in succession.

        Raises
        ------
        ValueError, TypeError
            If `count` is not an integer of at least 1.
        """
        check_int("count", count, minimum=1)
        return self.select(np.repeat(np.arange(self.batch_size), count))

    def to(self, device: Any) -> CacheState:
        """A copy on another torch device.

        Raises
        ------
        TypeError
            If the state is NumPy's.
        """
        if self.is_numpy:
            raise TypeError("device: a NumPy state has none; it stays where it is")
        layers = []
        for layer in self.layers:
            arrays = {name: array.to(device, copy=True) for name, array in layer.arrays().items()}
            layers.append(LayerState(**arrays, tokens_bound=layer.tokens_bound))
        return CacheState(self.config, layers, self.maps)

    def save(self, path: str | Path) -> None:
        """Write a snapshot: safetensors with the config inside, by way of a temporary name."""
        from .snapshot import save_snapshot

        save_snapshot(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: CacheConfig | None = None,
        maps: FeatureMaps | None = None,
        *,
        device: Any = None,
    ) -> CacheState:
        """Read a snapshot back; `CacheManager.load` does this with its own config and maps.

        Parameters
        ----------
        path
            What `save` wrote.
        config, maps
            What the snapshot must have been made with. Without a config: whatever it says itself;
            maps are needed where the snapshot has a low-rank state.
        device
            Where torch arrays go. Default: the CPU.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is truncated, no snapshot, or made with another config or other maps.
        """
        from .snapshot import load_snapshot

        return load_snapshot(Path(path), config, maps, device)

    def _like(self, layers: list[LayerState]) -> CacheState:
        state = CacheState(self.config, layers, self.maps)
        state.layer_maps = self.layer_maps
        state.prepared_for = self.prepared_for
        return state

    def _row_index(self, name: str, rows: Any) -> Array:
        if isinstance(rows, torch.Tensor):
            rows = rows.detach().cpu().numpy()
        given = check_rows(name, rows, self.batch_size)
        if self.is_numpy:
            return given
        return torch.as_tensor(given, dtype=torch.int64, device=self.layers[0].keys.device)


def allocate(
    layer: LayerConfig, batch_size: int, *, numpy: bool = False, device: Any = None
) -> LayerState:
    """An empty cache for one layer.

    Parameters
    ----------
    layer
        Shapes and dtypes.
    batch_size
        B.
    numpy
        NumPy arrays instead of torch tensors.
    device
        Of torch tensors.
    """

    def zeros(shape: Sequence[int], dtype: str) -> Array:
        if numpy:
            return np.zeros(shape, dtype=dtype)
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    heads = (batch_size, layer.kv_heads)
    slots = (*heads, layer.capacity)
    positions = zeros(slots, "int32")
    positions[...] = EMPTY
    return LayerState(
        keys=zeros((*slots, layer.head_dim), layer.dtype),
        values=zeros((*slots, layer.head_dim), layer.dtype),
        scores=zeros(slots, layer.score_dtype),
        positions=positions,
        H=zeros((*heads, layer.rank, layer.head_dim), layer.state_dtype),
        z=zeros((*heads, layer.rank), layer.state_dtype),
        length=zeros((batch_size,), "int32"),
        history=zeros(slots, "int64") if layer.policy.history_window else None,
    )
