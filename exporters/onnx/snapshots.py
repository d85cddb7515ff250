"""Snapshots of an `OnnxState`: those of `less_cache.CacheState`, so that either side reads both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from less_cache.state import CacheState, LayerState, allocate

from .manifest import Manifest
from .placement import Placement
from .state import OnnxState


@dataclass(frozen=True)
class _Maps:
    """All that a snapshot asks of feature maps: which they are."""

    digest: str


def to_cache_state(state: OnnxState) -> CacheState:
    """A copy of the state as the library's own, on the CPU.

    Raises
    ------
    ValueError
        If the model has sliding-window layers, which `CacheState` does not hold.
    """
    manifest = state.manifest
    _check_layers(manifest)
    config = manifest.config
    layers = []
    for i in range(config.num_layers):
        layer = allocate(config.layer(i), state.batch_size)
        arrays = _arrays(layer)
        for name in arrays:
            arrays[name].copy_(torch.from_numpy(state.arrays[f"{i}.{name}"].numpy()))
        layer.length.copy_(torch.from_numpy(state.lengths()))
        layer.tokens_bound = state.tokens_bound
        layers.append(layer)
    maps: Any = _Maps(manifest.maps_digest) if manifest.maps_digest else None
    return CacheState(config, layers, maps)


def save_state(state: OnnxState, path: Path) -> None:
    """Write a snapshot; see `OnnxState.save`."""
    to_cache_state(state).save(path)


def load_state(manifest: Manifest, placement: Placement, path: Path) -> OnnxState:
    """Read a snapshot; see `OnnxDecoder.load_state`."""
    _check_layers(manifest)
    maps: Any = _Maps(manifest.maps_digest) if manifest.maps_digest else None
    read = CacheState.load(path, manifest.config, maps)
    if read.config.dtype != manifest.config.dtype:
        raise ValueError(
            f"{path}: holds {read.config.dtype}, but the model is {manifest.config.dtype}"
        )
    arrays: dict[str, np.ndarray] = {"length": np.asarray(read.length)}
    for i, layer in enumerate(read.layers):
        for name, array in _arrays(layer).items():
            arrays[f"{i}.{name}"] = np.asarray(array)
    return OnnxState(manifest, placement, {n: placement.put(a) for n, a in arrays.items()})


def _arrays(layer: LayerState) -> dict[str, Any]:
    """Those of a layer's arrays that an exported model has too."""
    return {
        name: array
        for name, array in layer.arrays().items()
        if name != "length" and not (name in ("H", "z") and array.shape[2] == 0)
    }


def _check_layers(manifest: Manifest) -> None:
    sliding = len(manifest.data["layers"]) - len(manifest.full_layers)
    if sliding:
        raise ValueError(
            f"state: {sliding} layer(s) have a sliding window, which a snapshot has no place for"
        )
