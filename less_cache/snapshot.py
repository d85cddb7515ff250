"""Snapshots of a cache: one safetensors file with the config in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._files import replaced
from .config import CacheConfig

FORMAT = "less_cache.snapshot.2"
HEADER = {"config", "maps", "library", "tokens_bound"}


def write(
    path: Path,
    config: CacheConfig,
    layers: Sequence[Mapping[str, Any]],
    *,
    tokens_bounds: Sequence[int],
    maps_digest: str,
    library: str,
) -> None:
    """Write the arrays of all layers, by name, to `path`; see `CacheState.save`."""
    tensors = {
        f"layers.{i}.{name}": torch.as_tensor(array).detach().cpu().contiguous()
        for i, layer in enumerate(layers)
        for name, array in layer.items()
    }
    header = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "maps": maps_digest,
        "library": library,
        "tokens_bound": json.dumps([*tokens_bounds]),
    }
    with replaced(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)


@dataclass
class Snapshot:
    """What a file holds; `fill` takes its tensors out one layer after another."""

    path: Path
    config: CacheConfig
    maps_digest: str
    library: str
    tokens_bounds: list[int]
    tensors: dict[str, Tensor]

    @property
    def batch_size(self) -> int:
        """B.

        Raises
        ------
        ValueError
            If the file has no lengths to count.
        """
        lengths = self.tensors.get("layers.0.length")
        if lengths is None or len(lengths) == 0:
            raise ValueError(f"{self.path}: lacks layers.0.length")
        return len(lengths)

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

    def fill(self, index: int, arrays: Mapping[str, Any]) -> None:
        """Copy the tensors of layer `index` into `arrays`.

        Raises
        ------
        ValueError
            If one is missing, or of another shape or dtype.
        """
        for name, array in arrays.items():
            tensor = self.tensors.pop(f"layers.{index}.{name}", None)
            where = f"{self.path}: layers.{index}.{name}"
            if tensor is None or tuple(tensor.shape) != tuple(array.shape):
                found = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(f"{where}: found {found}, expected {tuple(array.shape)}")
            kind = torch.as_tensor(array).dtype
            if tensor.dtype != kind:
                raise ValueError(f"{where}: found {tensor.dtype}, expected {kind}")
            array[...] = np.asarray(tensor) if isinstance(array, np.ndarray) else tensor

    def check_all_used(self) -> None:
        """Refuse a file with more in it than a cache has.

        Raises
        ------
        ValueError
            If a tensor is left over.
        """
        if self.tensors:
            raise ValueError(f"{self.path}: unexpected tensors {sorted(self.tensors)}")


def read(path: Path) -> Snapshot:
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
    if missing := sorted(HEADER - set(header)):
        raise ValueError(f"{path}: its header lacks {missing}")
    config = CacheConfig.from_dict(json.loads(header["config"]))
    bounds = json.loads(header["tokens_bound"])
    if len(bounds) != config.num_layers:
        raise ValueError(f"{path}: tokens_bound: {len(bounds)} of {config.num_layers} layers")
    return Snapshot(path, config, header["maps"], header["library"], bounds, tensors)


def differences(saved: CacheConfig, wanted: CacheConfig) -> str:
    """The parameters in which two configs differ, in words."""
    return ", ".join(
        f"{name} is {getattr(saved, name)!r}, expected {getattr(wanted, name)!r}"
        for name in CacheConfig.__dataclass_fields__
        if getattr(saved, name) != getattr(wanted, name)
    )
