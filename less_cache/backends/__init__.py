"""The backends that carry out `append`; each agrees with `reference`, the definition."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

from .._checks import check_choice
from ..config import CacheConfig, LayerConfig
from ..feature_maps import LayerMaps
from ..state import LayerState

Array = Any

MODULES = {
    "reference": ".reference",
    "torch": ".torch_backend",
    "triton": ".triton",
}
"""By name: the module that holds the backend, imported when asked for."""


class Backend(Protocol):
    """What a backend's module defines."""

    def check_config(self, config: CacheConfig) -> None:
        """Refuse with a ValueError what this backend cannot run."""

    def prepare_maps(self, maps: LayerMaps, layer: LayerConfig, device: Any) -> LayerMaps:
        """The maps in the dtype and place that `append` reads them in."""

    def append(
        self,
        layer: LayerConfig,
        state: LayerState,
        maps: LayerMaps | None,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
    ) -> Array:
        """The only operation (docs/design.md); what comes in has been checked.

        Parameters
        ----------
        layer, state, maps
            The layer's shapes, its arrays (changed in place), its maps where the rank is above 0.
        q
            [B, Hq, S, D].
        k, v
            [B, Hkv, S, D].
        mask
            [B, S] booleans, false at padding; ``None``: no padding.

        Returns
        -------
        Array
            [B, Hq, S, D], zero at padding.
        """


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    check_choice("backend", name, MODULES)
    module: Any = importlib.import_module(MODULES[name], __package__)
    return module  # type: ignore[no-any-return]


def runs_on_triton(config: CacheConfig) -> bool:
    """Whether Triton is installed, and its backend takes this config."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        get_backend("triton").check_config(config)
    except ValueError:
        return False
    return True
