"""Snapshots of a cache: one safetensors file with the config and a digest in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import parse_json
from ._tensor_files import DIGEST, read_tensors, write_tensors
from .arrays import EMPTY, array_shapes
from .config import PARAMETERS, CacheConfig
from .layer_config import LayerConfig

FORMAT = "less_cache.snapshot.2"
HEADER = {"config", "maps", "transforms", "library", "tokens_bound", DIGEST}
LIBRARIES = ("numpy", "torch")


def write(
    path: Path,
    config: CacheConfig,
    layers: Sequence[Mapping[str, Any]],
    *,
    tokens_bounds: Sequence[int],
    maps_digest: str,
    library: str,
    transforms_digest: str = "",
) -> None:
    """Write the arrays of all layers, by name, to `path`; see `CacheState.save`."""
    tensors = {
        f"layers.{i}.{name}": torch.as_tensor(array)
        for i, layer in enumerate(layers)
        for name, array in layer.items()
    }
    header = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "maps": maps_digest,
        "transforms": transforms_digest,
        "library": library,
        "tokens_bound": json.dumps([*tokens_bounds]),
    }
    write_tensors(path, tensors, header)


@dataclass(frozen=True)
class Snapshot:
    """What a file holds.

    Parameters
    ----------
    path
        The file.
    config, maps_digest, transforms_digest, library, tokens_bounds
        As `write` was given them.
    digest
        Of the whole file.
    layers
        The arrays of each layer by name, [B, ...] each.
    """

    path: Path
    config: CacheConfig
    maps_digest: str
    transforms_digest: str
    library: str
    tokens_bounds: list[int]
    digest: str
    layers: list[dict[str, Tensor]]

    def check_config(self, config: CacheConfig | None) -> None:
        """Refuse a file that was made for another cache.

        Raises
        ------
        ValueError
            If `config` is given, and differs in more than its dtype.
        """
        if config is not None and self.config != config.with_dtype(self.config.dtype):
            found = differences(self.config, config)
            raise ValueError(f"{self.path}: made with another config: {found}")


def read(path: Path) -> Snapshot:
    """Read a snapshot and check that a cache may hold what is in it; see `CacheState.load`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such snapshot")
    header, tensors = read_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not a cache snapshot: format {header.get('format')!r}, expected {FORMAT!r}"
        )
    if missing := sorted(HEADER - set(header)):
        raise ValueError(f"{path}: its header lacks {missing}")
    if header["library"] not in LIBRARIES:
        raise ValueError(f"{path}: library: {header['library']!r}, expected one of {LIBRARIES}")
    config = _config(path, parse_json(f"{path}: config", header["config"]), tensors)
    layers = [
        _layer(f"{path}: layers.{i}", f"layers.{i}", layer, tensors)
        for i, layer in enumerate(config.layers)
    ]
    if tensors:
        raise ValueError(f"{path}: unexpected tensors {sorted(tensors)}")
    sizes = [len(layer["length"]) for layer in layers]
    if set(sizes) != {max(sizes)}:
        raise ValueError(f"{path}: layers.{sizes.index(min(sizes))} has another number of rows")
    bounds = parse_json(f"{path}: tokens_bound", header["tokens_bound"])
    _check_bounds(path, bounds, config, layers)
    for i, (layer, arrays) in enumerate(zip(config.layers, layers, strict=True)):
        _check_contents(f"{path}: layers.{i}", layer, arrays)
    return Snapshot(
        path,
        config,
        header["maps"],
        header["transforms"],
        header["library"],
        bounds,
        header[DIGEST],
        layers,
    )


def differences(saved: CacheConfig, wanted: CacheConfig) -> str:
    """The parameters in which two configs differ, in words."""
    return ", ".join(
        f"{name} is {getattr(saved, name)!r}, expected {getattr(wanted, name)!r}"
        for name in PARAMETERS
        if getattr(saved, name) != getattr(wanted, name)
    )


def _config(path: Path, data: Any, tensors: Mapping[str, Tensor]) -> CacheConfig:
    """The config, once the tensors bear out that it is no larger than they are."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: config: unexpected {type(data).__name__}")
    # A config unfolds into one entry a layer and a head: these two numbers cost memory.
    held = {name.split(".")[1] for name in tensors if name.count(".") == 2}
    state = tensors.get("layers.0.H")
    heads = 0 if state is None or state.ndim != 4 else state.shape[1]
    for name, found in (("num_layers", len(held)), ("kv_heads", heads)):
        if type(data.get(name)) is int and data[name] > found:
            raise ValueError(f"{path}: config: {name} = {data[name]}, but found tensors of {found}")
    try:
        return CacheConfig.from_dict(data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: config: {error}") from None


def _layer(
    where: str, prefix: str, layer: LayerConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The arrays of one layer, taken out of `tensors`, of the shapes that the config asks for."""
    length = tensors.get(f"{prefix}.length")
    if length is None or length.ndim != 1 or len(length) == 0:
        raise ValueError(f"{where}.length: found nothing, expected [rows]")
    arrays = {}
    for name, (shape, dtype) in {**array_shapes(layer), "length": ((), "int32")}.items():
        tensor = tensors.pop(f"{prefix}.{name}", None)
        wanted = (len(length), *shape)
        if tensor is None or tuple(tensor.shape) != wanted:
            found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(f"{where}.{name}: found {found}, expected {wanted}")
        if tensor.dtype != getattr(torch, dtype):
            raise ValueError(f"{where}.{name}: found {tensor.dtype}, expected {dtype}")
        arrays[name] = tensor
    return arrays


def _check_bounds(
    path: Path, bounds: Any, config: CacheConfig, layers: Sequence[Mapping[str, Tensor]]
) -> None:
    whole = isinstance(bounds, list) and all(type(bound) is int and bound >= 0 for bound in bounds)
    if not whole or len(bounds) != config.num_layers:
        raise ValueError(
            f"{path}: tokens_bound: unexpected {bounds!r:.200}, expected {config.num_layers} "
            "integers >= 0"
        )
    for i, (layer, arrays, bound) in enumerate(zip(config.layers, layers, bounds, strict=True)):
        if not layer.policy.evicts and bound < int(arrays["length"].max()):
            raise ValueError(f"{path}: tokens_bound: layer {i} has seen more than {bound} tokens")


def _check_contents(where: str, layer: LayerConfig, arrays: Mapping[str, Tensor]) -> None:
    """Refuse numbers that no cache comes to."""
    for name, array in arrays.items():
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise ValueError(f"{where}.{name}: holds NaN or infinity")
    for name in ("z", "length", "key_scales", "value_scales"):
        if name in arrays and bool((arrays[name] < 0).any()):
            raise ValueError(f"{where}.{name}: holds a number below 0")
    positions = arrays["positions"]
    if bool((positions < EMPTY).any()):
        raise ValueError(f"{where}.positions: holds a number below {EMPTY}")
    if bool((positions >= arrays["length"].unsqueeze(1)).any()):
        raise ValueError(f"{where}.positions: holds one beyond the tokens that its row has seen")
    for head in range(layer.kv_heads):
        ordered = positions[:, layer.head_slots(head)].sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any()):
            raise ValueError(f"{where}.positions: head {head} holds a position twice")
    if "history" in arrays:
        history = arrays["history"]
        if bool(((history < 0) | (history >= 2**layer.policy.history_window)).any()):
            raise ValueError(f"{where}.history: holds more bits than the policy looks back on")
