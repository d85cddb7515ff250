"""Snapshots of a cache: one safetensors file with the config in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._files import replaced
from .config import CacheConfig
from .feature_maps import FeatureMaps
from .state import CacheState, allocate

FORMAT = "less_cache.snapshot.1"


def save_snapshot(state: CacheState, path: Path) -> None:
    """Write `state` to `path`; see `CacheState.save`."""
    tensors = {
        f"layers.{i}.{name}": torch.as_tensor(array).detach().cpu().contiguous()
        for i, layer in enumerate(state.layers)
        for name, array in layer.arrays().items()
    }
    header = {
        "format": FORMAT,
        "config": json.dumps(state.config.to_dict()),
        "maps": state.maps.digest if state.maps else "",
        "library": "numpy" if state.is_numpy else "torch",
        "tokens_bound": json.dumps([layer.tokens_bound for layer in state.layers]),
    }
    with replaced(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)


def load_snapshot(
    path: Path, config: CacheConfig | None, maps: FeatureMaps | None, device: Any
) -> CacheState:
    """Read a snapshot; see `CacheState.load`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such snapshot")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a cache snapshot: format {header.get('format')!r}, expected {FORMAT!r}"
        )
    if missing := sorted({"config", "maps", "library", "tokens_bound"} - set(header)):
        raise ValueError(f"{path}: its header lacks {missing}")
    saved = CacheConfig.from_dict(json.loads(header["config"]))
    if config is not None and saved != config.with_dtype(saved.dtype):
        raise ValueError(f"{path}: made with another config: {differences(saved, config)}")
    if saved.rank:
        if maps is None:
            raise ValueError(f"{path}: has a low-rank state; maps must be given to go on with it")
        if maps.digest != header["maps"]:
            raise ValueError(f"{path}: made with other feature maps than those given")
    state = _read(path, saved, header, tensors, device)
    state.maps = maps if saved.rank else None
    return state


def _read(
    path: Path, config: CacheConfig, header: dict[str, str], tensors: dict[str, Any], device: Any
) -> CacheState:
    numpy = header["library"] == "numpy"
    batch_size = len(tensors["layers.0.length"]) if "layers.0.length" in tensors else 0
    if batch_size == 0:
        raise ValueError(f"{path}: lacks layers.0.length")
    layers = []
    for i, bound in enumerate(json.loads(header["tokens_bound"])):
        layer = allocate(config.layer(i), batch_size, numpy=numpy, device=device)
        for name, array in layer.arrays().items():
            tensor = tensors.pop(f"layers.{i}.{name}", None)
            if tensor is None or tuple(tensor.shape) != tuple(array.shape):
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"{path}: layers.{i}.{name}: found {found}, expected {tuple(array.shape)}"
                )
            kind = torch.as_tensor(array).dtype
            if tensor.dtype != kind:
                raise ValueError(
                    f"{path}: layers.{i}.{name}: found {tensor.dtype}, expected {kind}"
                )
            array[...] = np.asarray(tensor) if numpy else tensor
        layer.tokens_bound = bound
        layers.append(layer)
    if tensors:
        raise ValueError(f"{path}: unexpected tensors {sorted(tensors)}")
    return CacheState(config, layers)


def differences(saved: CacheConfig, wanted: CacheConfig) -> str:
    """The fields in which two configs differ, in words."""
    first, second = saved.to_dict(), wanted.to_dict()
    return ", ".join(
        f"{name} is {first[name]!r}, expected {second[name]!r}"
        for name in first
        if first[name] != second[name]
    )
