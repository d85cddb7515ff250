"""A transformers cache in a folder: the state's snapshot, and what only transformers has beside it.

The snapshot is the one that counts. The other file is named after it and is there before it, so
that a save takes effect in one step: when the snapshot gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..._files import parse_json, replaced
from ..._tensor_files import DIGEST, read_tensors, write_tensors
from ...state import CacheState

FORMAT = "less_cache.transformers.2"
STATE_FILE = "state.safetensors"
LAYERS_FILES = "layers.*.safetensors"


@dataclass(frozen=True)
class SavedLayers:
    """What lies beside the snapshot.

    Parameters
    ----------
    sliding
        Keys and values of the sliding-window layers, ``"0.keys"``, ``"0.values"``, ...
    seen
        Tokens that each layer of the model has seen, padding included.
    path
        The file, for messages.
    """

    sliding: dict[str, Tensor]
    seen: list[int]
    path: Path


def save_cache(
    folder: Path, state: CacheState, sliding: Mapping[str, Tensor], seen: Sequence[int]
) -> None:
    """Write a cache in place of the one that `folder` holds; see `SavedLayers`."""
    with replaced(folder / STATE_FILE) as temporary:
        state.save(temporary)
        digest = read_tensors(temporary)[0][DIGEST]
        beside = layers_file(folder, digest)
        header = {"format": FORMAT, "state": digest, "seen": json.dumps([*seen])}
        # Drawn up in the snapshot's own temporary folder: its name is a new one at each save, so
        # that nobody would ever clear away what a kill leaves of it.
        drawn = layers_file(temporary.parent, digest)
        write_tensors(drawn, sliding, header)
        drawn.replace(beside)
    for old in folder.glob(LAYERS_FILES):
        if old != beside:
            old.unlink(missing_ok=True)


def load_cache(
    folder: Path, load_state: Callable[[Path], CacheState]
) -> tuple[CacheState, SavedLayers]:
    """Read what `save_cache` wrote.

    Parameters
    ----------
    folder
        Where.
    load_state
        Reads the snapshot.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If one is damaged.
    """
    state = load_state(folder / STATE_FILE)
    digest = read_tensors(folder / STATE_FILE)[0][DIGEST]
    path = layers_file(folder, digest)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, which belongs to {STATE_FILE} beside it")
    header, sliding = read_tensors(path)
    if header.get("format") != FORMAT or DIGEST not in header:
        raise ValueError(f"{path}: got format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("state") != digest:
        raise ValueError(f"{path}: does not belong to the {STATE_FILE} beside it")
    seen = parse_json(f"{path}: seen", header.get("seen", "null"))
    if not isinstance(seen, list) or not all(type(count) is int and count >= 0 for count in seen):
        raise ValueError(f"{path}: seen: unexpected {seen!r:.80}, expected integers >= 0")
    return state, SavedLayers(sliding, seen, path)


def layers_file(folder: Path, digest: str) -> Path:
    """What lies beside the snapshot of that digest."""
    return folder / LAYERS_FILES.replace("*", digest[:16])
