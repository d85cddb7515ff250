"""Snapshots of an exported model's state, in the format of `less_cache.CacheState`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from less_cache import ops, snapshot
from less_cache.layer_config import LayerConfig
from less_cache.state import CacheState, LayerState, allocate

from .heads import run_name
from .manifest import Manifest


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
    layers = []
    for index, config in enumerate(manifest.config.layers):
        layer = allocate(config, len(arrays["length"]))
        for name, view in _dense(index, config, layer).items():
            view.copy_(arrays[name])
        layer.length.copy_(arrays["length"])
        layer.tokens_bound = bound
        layers.append(layer)
    return CacheState(
        manifest.config,
        layers,
        maps_digest=manifest.maps_digest or "",
        transforms_digest=manifest.transforms_digest or "",
    )


def read_arrays(manifest: Manifest, path: Path) -> dict[str, Tensor]:
    """Read a snapshot's arrays, by the manifest's names, to the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, or it is of another config, maps, transforms
        or dtype.
    """
    _check_layers(manifest)
    read = snapshot.read(path)
    read.check_config(manifest.config)
    if read.maps_digest != (manifest.maps_digest or ""):
        raise ValueError(f"{path}: made with other feature maps than the model's")
    if read.transforms_digest != (manifest.transforms_digest or ""):
        raise ValueError(f"{path}: made with other transforms than the model's")
    if read.config.dtype != manifest.config.dtype:
        raise ValueError(
            f"{path}: holds {read.config.dtype}, but the model is {manifest.config.dtype}"
        )
    arrays: dict[str, Tensor] = {}
    for index, (config, tensors) in enumerate(
        zip(manifest.config.layers, read.layers, strict=True)
    ):
        held: dict[str, Any] = dict(tensors)
        layer = LayerState(**held)
        arrays["length"] = layer.length
        arrays.update(_dense(index, config, layer))
    # What is an array of 16 bits here has 32 in an exported model.
    return {
        name: (array.int() if name.endswith(".positions") else array).contiguous()
        for name, array in arrays.items()
    }


def _dense(index: int, config: LayerConfig, layer: LayerState) -> dict[str, Tensor]:
    """Views of a layer's arrays as an exported model has them, by the manifest's names."""
    views = {}
    for run in config.runs:
        held = layer.of_run(run).named()
        prefix = run_name(index, config, run)
        views.update({f"{prefix}.{name}": held[name] for name in ops.state_names(config)})
    return views


def _check_layers(manifest: Manifest) -> None:
    sliding = len(manifest.data["layers"]) - len(manifest.full_layers)
    if sliding:
        raise ValueError(
            f"state: {sliding} layer(s) have a sliding window, which a snapshot cannot hold"
        )
