"""Snapshots of an exported model's state, in the format of `less_cache.CacheState`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from less_cache.state import CacheState, LayerState, allocate

from .manifest import Manifest


@dataclass(frozen=True)
class _Maps:
    """In place of feature maps, of which a snapshot needs only the digest."""

    digest: str


def to_cache_state(manifest: Manifest, arrays: Mapping[str, Tensor], bound: int) -> CacheState:
    """Copy a state into a `CacheState` on the CPU.

    Parameters
    ----------
    manifest
        The exported model's.
    arrays
        The state's, by the manifest's names.
    bound
        No sequence has seen more tokens than this.

    Raises
    ------
    ValueError
        If the model has sliding-window layers, which `CacheState` does not hold.
    """
    _check_layers(manifest)
    config = manifest.config
    layers = []
    for i in range(config.num_layers):
        layer = allocate(config.layer(i), len(arrays["length"]))
        own = _arrays(layer)
        for name in own:
            own[name].copy_(arrays[f"{i}.{name}"])
        layer.length.copy_(arrays["length"])
        layer.tokens_bound = bound
        layers.append(layer)
    return CacheState(config, layers, _maps(manifest))


def read_arrays(manifest: Manifest, path: Path) -> dict[str, Tensor]:
    """Read a snapshot's arrays, by the manifest's names, to the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, or it is of another config, maps or dtype.
    """
    _check_layers(manifest)
    read = CacheState.load(path, manifest.config, _maps(manifest))
    if read.config.dtype != manifest.config.dtype:
        raise ValueError(
            f"{path}: holds {read.config.dtype}, but the model is {manifest.config.dtype}"
        )
    arrays: dict[str, Tensor] = {"length": read.length}
    for i, layer in enumerate(read.layers):
        arrays.update({f"{i}.{name}": array for name, array in _arrays(layer).items()})
    return arrays


def _maps(manifest: Manifest) -> Any:
    return _Maps(manifest.maps_digest) if manifest.maps_digest else None


def _arrays(layer: LayerState) -> dict[str, Any]:
    """The arrays of a layer that an exported model has, too."""
    return {
        name: array
        for name, array in layer.arrays().items()
        if name != "length" and not (name in ("H", "z") and array.shape[2] == 0)
    }


def _check_layers(manifest: Manifest) -> None:
    sliding = len(manifest.data["layers"]) - len(manifest.full_layers)
    if sliding:
        raise ValueError(
            f"state: {sliding} layer(s) have a sliding window, which a snapshot cannot hold"
        )
