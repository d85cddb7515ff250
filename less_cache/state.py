"""What a cache holds between calls: pairs, scores, positions and the low-rank state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import snapshot
from ._checks import check_device, check_int, check_memory, check_path, check_rows
from .arrays import EMPTY, MOST_ROWS, Array, LayerArrays, empty_arrays, lasting
from .config import CacheConfig
from .feature_maps import FeatureMaps
from .layer_config import LayerConfig
from .quantization.transforms import Transforms


@dataclass
class LayerState(LayerArrays):
    """One layer's cache of a batch, and how many tokens each row has seen.

    Parameters
    ----------
    keys, values, scores, positions, H, z, history
        As of `LayerArrays`, with a row a sequence.
    length
        [B] int32, tokens seen.
    tokens_bound
        No row has seen more tokens than this, so that the device need not be asked whether there
        is room for more.
    """

    length: Array = None
    tokens_bound: int = 0

    def arrays(self) -> dict[str, Array]:
        """The arrays by name, `history` only where there is one, and `length`."""
        return {**self.named(), "length": self.length}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in self.arrays().values())


class _Turn:
    """Who holds it may change a state; whoever comes meanwhile is refused."""

    def __init__(self) -> None:
        # Taking the last item off a list is one step that no other thread divides.
        self._free = [True]

    def __enter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            raise RuntimeError(
                "state: another call of attend() on it has not ended; a CacheState belongs to one "
                "thread at a time, so give each thread one of its own (state.clone())"
            ) from None

    def __exit__(self, *error: object) -> None:
        self._free.append(True)


class CacheState:
    """All layers' caches of one batch of sequences. Made by `CacheManager.init`.

    It belongs to one thread at a time.

    Attributes
    ----------
    config : CacheConfig
        With the dtype that the arrays have.
    layers : list of LayerState
    maps_digest : str
        `FeatureMaps.digest` of the maps that the low-rank state was made with; "" for rank 0.
    transforms : Transforms or None
        The calibrated bases that pairs are coded in.
    """

    def __init__(
        self,
        config: CacheConfig,
        layers: list[LayerState],
        maps: FeatureMaps | None = None,
        *,
        maps_digest: str = "",
        transforms: Transforms | None = None,
        transforms_digest: str = "",
    ) -> None:
        self.transforms = transforms
        self.config = config
        self.layers = layers
        self.maps = maps
        self._maps_digest = maps_digest
        self._transforms_digest = transforms_digest
        # What the manager that the state was last handed to has made ready for it.
        self.plan: Any = None
        self._turn = _Turn()

    def turn(self) -> _Turn:
        """A context in which no other call changes the state.

        Raises
        ------
        RuntimeError
            On entering, if another call has not left it yet.
        """
        return self._turn

    def __getstate__(self) -> dict[str, Any]:
        own = vars(self).copy()
        # A plan holds modules, and the managers make it again; a turn is nobody else's.
        return {**own, "plan": None, "_turn": _Turn()}

    @property
    def maps_digest(self) -> str:
        return self._maps_digest or (self.maps.digest if self.maps else "")

    @property
    def transforms_digest(self) -> str:
        """`Transforms.digest` of the bases that pairs are coded in; "" where none are fitted."""
        return self._transforms_digest or (self.transforms.digest if self.transforms else "")

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheState:
        return self.clone()

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
            with lasting():
                arrays = {name: array[index] for name, array in layer.arrays().items()}
            layers.append(LayerState(**arrays, tokens_bound=layer.tokens_bound))
        return self._like(layers)

    def clone(self) -> CacheState:
        """A copy that goes on by itself, such as one for each continuation of a prompt."""
        return self.select(np.arange(self.batch_size))

    def repeat(self, count: int) -> CacheState:
        """A new state with each row `count` times in succession.

        Raises
        ------
        ValueError, TypeError
            If `count` is not an integer of at least 1.
        """
        check_int("count", count, minimum=1, maximum=MOST_ROWS // self.batch_size)
        check_memory("count", count, count * self.nbytes, self._device)
        return self.select(np.repeat(np.arange(self.batch_size), count))

    def to(self, device: Any) -> CacheState:
        """A copy on another torch device.

        Raises
        ------
        TypeError, ValueError
            If the state is NumPy's, or there is no such device.
        """
        if self.is_numpy:
            raise TypeError("device: a NumPy state has none; it stays where it is")
        device = check_device("device", device)
        layers = []
        for layer in self.layers:
            with lasting():
                arrays = {n: array.to(device, copy=True) for n, array in layer.arrays().items()}
            layers.append(LayerState(**arrays, tokens_bound=layer.tokens_bound))
        return self._like(layers)

    def save(self, path: str | Path) -> None:
        """Write a snapshot: safetensors with the config inside, by way of a temporary name.

        Raises
        ------
        ValueError
            If a policy is a user's own that nobody registered: it could not be read back.
        """
        snapshot.write(
            check_path("path", path),
            self.config,
            [layer.arrays() for layer in self.layers],
            tokens_bounds=[layer.tokens_bound for layer in self.layers],
            maps_digest=self.maps_digest,
            transforms_digest=self.transforms_digest,
            library="numpy" if self.is_numpy else "torch",
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: CacheConfig | None = None,
        maps: FeatureMaps | None = None,
        *,
        device: Any = None,
        transforms: Transforms | None = None,
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
        transforms
            The bases that pairs were coded in, where they are calibrated.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, no snapshot, holds what no cache can hold, or was made with
            another config or other maps.
        """
        if device is not None:
            device = check_device("device", device)
        found = snapshot.read(check_path("path", path))
        found.check_config(config)
        if found.config.has_state:
            if maps is None:
                raise ValueError(
                    f"{path}: has a low-rank state; maps must be given to go on with it"
                )
            if maps.digest != found.maps_digest:
                raise ValueError(f"{path}: made with other feature maps than those given")
        if found.transforms_digest != (transforms.digest if transforms else ""):
            raise ValueError(f"{path}: made with other transforms than those given")
        layers = []
        for tensors, bound in zip(found.layers, found.tokens_bounds, strict=True):
            if found.library == "numpy":
                arrays: dict[str, Array] = {n: t.numpy().copy() for n, t in tensors.items()}
            else:
                with lasting():
                    arrays = {n: tensor.to(device, copy=True) for n, tensor in tensors.items()}
            # Who wrote the file may not have counted.
            seen = int(tensors["length"].max())
            layers.append(LayerState(**arrays, tokens_bound=max(bound, seen)))
        own = maps if found.config.has_state else None
        return cls(found.config, layers, own, transforms=transforms)

    def _like(self, layers: list[LayerState]) -> CacheState:
        return CacheState(
            self.config,
            layers,
            self.maps,
            maps_digest=self._maps_digest,
            transforms=self.transforms,
            transforms_digest=self._transforms_digest,
        )

    def _row_index(self, name: str, rows: Any) -> Array:
        # A copy: torch takes no reversed view.
        given = check_rows(name, rows, self.batch_size).astype(np.int64)
        return given if self.is_numpy else torch.as_tensor(given, device=self._device)

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.is_numpy else self.layers[0].keys.device


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
    arrays = empty_arrays(layer, batch_size, numpy=numpy, device=device)
    if numpy:
        length: Array = np.zeros(batch_size, dtype="int32")
    else:
        with lasting():
            length = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return LayerState(**arrays.named(), length=length)
