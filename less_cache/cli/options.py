"""The options that several commands have, and what their texts mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .._files import parse_json
from ..feature_maps import FeatureMaps
from ..maps_io import WEIGHTS
from ..policies import POLICIES
from ..recipe import FILE as WHOLE

SHIPPED = "reference"
"""The name by which the model that ships with the package is asked for."""

ModelOption = Annotated[
    str, typer.Option(help=f"Folder or hub id of the model, or '{SHIPPED}': the shipped one.")
]
DataOption = Annotated[
    str, typer.Option(help="Text file or folder, datasets:NAME[:CONFIG[:SPLIT]], or .npy of ids.")
]
CapacityOption = Annotated[
    str,
    typer.Option(
        help="Slots a head (52), or a share of the model's positions (0.05, 5%); or a JSON list, "
        "or a .json file of one, with an entry a layer, each one number or one a KV head: "
        "'[52, [16, 128]]'."
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(map(str.lower, POLICIES))}; with fields: sinkwindow:sinks=4,recent=16."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="Of the model: float32, float16 or bfloat16.")]
LengthOption = Annotated[
    int | None, typer.Option(min=4, help="Tokens a sequence; default: the model's positions.")
]
SequencesOption = Annotated[
    int | None, typer.Option(min=1, help="How many; default: all there are.")
]


def parse_capacity(text: str) -> Any:
    """What `CacheConfig` takes as `capacity`, from its command-line spelling.

    Raises
    ------
    ValueError
        If it is none.
    FileNotFoundError
        If it names a file that is not there.
    """
    text = text.strip()
    if text.endswith(".json"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"capacity: {text} is no file")
        return _listed(text, Path(text).read_bytes())
    if text.startswith("["):
        return _listed(text, text)
    if text.endswith("%"):
        return text
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(
            f"capacity: got {text!r}, expected slots (52), a share (0.05, 5%), or a JSON list"
        ) from None


def _listed(name: str, text: str | bytes) -> list[Any]:
    """A JSON list of what a layer has: one number, or a list of one a KV head."""
    found = parse_json(f"capacity: {name:.60}", text)
    if not isinstance(found, list):
        raise ValueError(f"capacity: {name:.60} holds {type(found).__name__}, expected a list")
    for layer, entry in enumerate(found):
        for value in entry if isinstance(entry, list) else [entry]:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError(
                    f"capacity: layer {layer} has {value!r:.60}, expected slots or a share, or a "
                    "list of one a KV head"
                )
    return found


def parse_layers(text: str | None, num_layers: int) -> range | None:
    """The layers that ``3`` or ``0:8`` names.

    Raises
    ------
    ValueError
        If it names none.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    try:
        start = int(first or 0)
        stop = start + 1 if ":" not in text else int(last or num_layers)
    except ValueError:
        raise ValueError(f"layers: got {text!r}, expected 3, or 0:8") from None
    if not 0 <= start < stop <= num_layers:
        raise ValueError(f"layers: got {text!r}, expected a part of 0:{num_layers}")
    return range(start, stop)


def named_maps(entries: list[str]) -> dict[str, FeatureMaps]:
    """Maps by name, from ``FOLDER`` or ``NAME=FOLDER``; a hub id will do for a folder.

    Without a name the first is called LESS, others as their folders.

    Raises
    ------
    ValueError, FileNotFoundError
        If a name comes twice, or there are no such maps.
    """
    named: dict[str, FeatureMaps] = {}
    for entry in entries:
        name, separator, folder = entry.partition("=")
        if not separator or Path(entry).is_dir():
            folder = entry
            name = f"LESS {Path(entry).name}" if "LESS" in named else "LESS"
        if not name or name in named:
            raise ValueError(f"maps: got {entry!r}, expected NAME=FOLDER, each name once")
        if (Path(folder) / WHOLE).is_file() and not (Path(folder) / WEIGHTS).is_file():
            raise ValueError(f"maps: {folder} holds a whole cache; use --cache")
        named[name] = FeatureMaps.from_pretrained(folder)
    return named


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be one.

    Raises
    ------
    ValueError
        If a file has that name, or nothing may be written there.
    """
    there = next(path for path in (out, *out.parents, Path()) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"out: {there} may not be written to")
