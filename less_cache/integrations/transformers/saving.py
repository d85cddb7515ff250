"""A `LessCache` in a folder: the state's snapshot, and what only transformers needs beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..._files import replaced
from .cache import LessCache, LessLayer

FORMAT = "less_cache.transformers.1"
STATE_FILE = "state.safetensors"
LAYERS_FILE = "layers.safetensors"


def save_cache(cache: LessCache, folder: Path) -> None:
    """Write `cache`; see `LessCache.save`."""
    if cache.state is None:
        raise ValueError("cache: has seen no tokens yet, so there is nothing to save")
    tensors = {}
    for i, layer in cache.sliding_layers.items():
        tensors[f"{i}.keys"] = layer.keys.detach().cpu().contiguous()
        tensors[f"{i}.values"] = layer.values.detach().cpu().contiguous()
    cache.state.save(folder / STATE_FILE)
    header = {
        "format": FORMAT,
        "seen": json.dumps([cache.get_seq_length(i) for i in range(len(cache))]),
        # The two files are written one after the other; this tells whether they belong together.
        "state": _digest(folder / STATE_FILE),
    }
    with replaced(folder / LAYERS_FILE) as temporary:
        save_file(tensors, str(temporary), metadata=header)


def load_cache(cache: LessCache, folder: Path, device: Any) -> LessCache:
    """Fill the empty `cache` from `folder`; see `LessCache.load`."""
    state = cache.manager.load(folder / STATE_FILE, device=device)
    path = folder / LAYERS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file: {error}") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: got format {header.get('format')!r}, expected {FORMAT!r}")
    if header["state"] != _digest(folder / STATE_FILE):
        raise ValueError(f"{path}: does not belong to the {STATE_FILE} beside it")
    seen = json.loads(header["seen"])
    sliding = cache.sliding_layers
    wanted = {f"{i}.{name}" for i in sliding for name in ("keys", "values")}
    if len(seen) != len(cache) or set(tensors) != wanted:
        raise ValueError(
            f"{path}: made for {len(seen)} layers, of which {sorted(tensors)} slide; the model has "
            f"{len(cache)}, of which {sorted(wanted)} slide"
        )
    for i, layer in sliding.items():
        keys, values = (tensors[f"{i}.{name}"].to(device) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, seen[i]
    for layer, count in zip(cache.layers, seen, strict=True):
        if isinstance(layer, LessLayer):
            layer.seen = count
    cache.adopt(state)
    return cache


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
