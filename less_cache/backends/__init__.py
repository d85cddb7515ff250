"""The backends that carry out the step; each agrees with `reference`, the definition."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

from .._checks import check_choice
from ..arrays import LayerArrays
from ..config import CacheConfig
from ..layer_config import LayerConfig
from ..layer_maps import LayerMaps

Array = Any

PreparedMaps = Any
"""One layer's maps in the form in which its backend reads them."""


class Backend(Protocol):
    """What a backend's module defines."""

    def check_config(self, config: CacheConfig) -> None:
        """Refuse with a ValueError what this backend cannot run."""

    def prepare_maps(self, maps: LayerMaps, layer: LayerConfig, device: Any) -> PreparedMaps:
        """The maps in the dtype and place that `attend` reads them in."""

    def attend(
        self,
        layer: LayerConfig,
        arrays: LayerArrays,
        maps: PreparedMaps | None,
        q: Array,
        k: Array,
        v: Array,
        *,
        lengths: Array,
        rows: Array | None = None,
        mask: Array | None = None,
        clean: bool = False,
        shift: Array | None = None,
    ) -> Array:
        """The only operation (docs/design.md); what comes in has been checked.

        Parameters
        ----------
        layer, arrays, maps
            The layer's shapes, its arrays (changed in place), its maps where the rank is above 0.
        q
            [B, Hq, S, D].
        k, v
            [B, Hkv, S, D].
        lengths
            [B] int32 or int64, tokens seen before these; never changed here. A row of length 0
            counts as empty whatever its arrays hold.
        rows
            [B] int32 or int64: row i of the call is row ``rows[i]`` of the arrays. Rows that are
            named more than once end as anything; no other row suffers. ``None``: row i is row i.
        mask
            [B, S] booleans, false at padding; ``None``: no padding.
        clean
            Whether rows of length 0 are known to be as `empty_arrays` makes them.
        shift
            [B, Hq, S], added to each query's products with keys; ``None``: nothing. For coded
            pairs, whose keys are centred (`LayerTransforms.enter`).

        Returns
        -------
        Array
            [B, Hq, S, D], zero at padding.
        """

    def eviction_times(
        self, layer: LayerConfig, q: Array, k: Array, mask: Array | None, *, prompt: int
    ) -> Array:
        """When each pair of known sequences leaves; see `teacher_forced.eviction_times`."""


@dataclass(frozen=True)
class Entry:
    """A backend in the registry.

    Parameters
    ----------
    module
        The full name of the module, imported when the backend is asked for.
    devices
        Types of device whose arrays it takes; ``"numpy"`` for NumPy's.
    needs
        A package that may be missing.
    """

    module: str
    devices: tuple[str, ...]
    needs: str | None = None


BACKENDS: dict[str, Entry] = {}
"""By name, in the order of preference of ``backend="auto"``."""


def register_backend(name: str, entry: Entry) -> None:
    """Make a backend known; ``"auto"`` prefers those that were registered earlier.

    Raises
    ------
    ValueError
        If the name is taken, or is ``"auto"``.
    """
    if name == "auto" or name in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one that is free: not auto, {[*BACKENDS]}")
    BACKENDS[name] = entry


register_backend("triton", Entry(f"{__name__}.triton", ("cuda",), needs="triton"))
register_backend("torch", Entry(f"{__name__}.torch", ("cpu", "cuda", "mps", "xpu", "meta")))
register_backend("inductor", Entry(f"{__name__}.inductor", ("cpu",)))
register_backend("reference", Entry(f"{__name__}.reference", ("numpy", "cpu", "cuda")))


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    check_choice("backend", name, BACKENDS)
    module: Any = importlib.import_module(BACKENDS[name].module)
    return module  # type: ignore[no-any-return]


def best_backend(config: CacheConfig, device: str) -> str:
    """The first backend that takes this config on a device of that type.

    Parameters
    ----------
    config
        With the dtype that the arrays have.
    device
        ``"cpu"``, ``"cuda"``, ..., or ``"numpy"``.

    Raises
    ------
    ValueError
        If none does, with the last one's reason.
    """
    reason: Exception = ValueError(f"device: got {device!r}, which no backend has arrays on")
    for name, entry in BACKENDS.items():
        if device not in entry.devices:
            continue
        if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
            continue
        try:
            get_backend(name).check_config(config)
        except ValueError as error:
            reason = error
        else:
            return name
    raise reason
