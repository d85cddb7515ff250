"""``less_cache_engine.json``: what a folder of engines holds, and where they run."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from exporters.common.folders import check_files, described, read_index
from exporters.common.manifest import Manifest, manifest_of
from less_cache._files import write_text

from .limits import Limits

ENGINE_MANIFEST = "less_cache_engine.json"
STEP_ENGINE, PROMPT_ENGINE = "step.engine", "prompt.engine"
PLUGIN_CODE_DTYPE = "int8"
"""Of the bytes of codes at the edge of a step with the plugin, whose tensors cannot be of uint8:
the same bytes, which nothing else in the graph reads."""
FORMAT = "less_cache.tensorrt.1"
FIELDS: dict[str, Any] = {
    "tensorrt": str,
    "device": {"name": str, "capability": [int]},
    "plugin": (str, type(None)),
    "limits": {field.name: int for field in fields(Limits)},
    "model": dict,
    "files": dict,
}


@dataclass(frozen=True)
class EngineManifest:
    """What `ENGINE_MANIFEST` says.

    Attributes
    ----------
    model : Manifest
        That of the exported model that the engines were built from.
    limits : Limits
        Sizes of batches and prompts.
    tensorrt : str
        The version that built them.
    device : dict
        The GPU they were built on: ``name``, ``capability``.
    plugin : str or None
        The plugin library's file in the folder; ``None``: the engines need none.
    """

    model: Manifest
    limits: Limits
    tensorrt: str
    device: dict[str, Any]
    plugin: str | None

    @property
    def folder(self) -> Path:
        """Where it was read."""
        return self.model.folder


def write_engine_manifest(
    folder: Path,
    names: list[str],
    model: Manifest,
    limits: Limits,
    *,
    tensorrt: str,
    device: dict[str, Any],
    plugin: str | None,
) -> None:
    """Describe the files of these names in `folder`."""
    data = {
        "format": FORMAT,
        "tensorrt": tensorrt,
        "device": device,
        "plugin": plugin,
        "limits": limits.to_dict(),
        "model": model.data,
        "files": {name: described(folder / name) for name in names},
    }
    write_text(folder / ENGINE_MANIFEST, json.dumps(data, indent=2) + "\n")


def read_engine_manifest(folder: str | Path, *, verify: bool = True) -> EngineManifest:
    """Read a folder's manifest, and check the folder against it.

    Parameters
    ----------
    folder
        What `build_engines` wrote.
    verify
        Read every file to the end and compare its digest; otherwise only the sizes.

    Raises
    ------
    FileNotFoundError
        If the manifest or a file that it names is missing.
    ValueError
        If the manifest is damaged or of another format, or a file is truncated or is another file.
    """
    folder = Path(folder)
    writer = "less-cache export tensorrt"
    data = read_index(folder, ENGINE_MANIFEST, FORMAT, FIELDS, writer)
    model = manifest_of(folder, data["model"], f"{folder / ENGINE_MANIFEST}: model")
    wanted = [STEP_ENGINE, PROMPT_ENGINE]
    if data["plugin"] is not None:
        wanted.append(data["plugin"])
    check_files(folder, ENGINE_MANIFEST, data["files"], wanted, verify)
    return EngineManifest(
        model=model,
        limits=Limits(**{name: data["limits"][name] for name in FIELDS["limits"]}),
        tensorrt=data["tensorrt"],
        device=data["device"],
        plugin=data["plugin"],
    )


def check_place(manifest: EngineManifest, tensorrt: str, device: dict[str, Any]) -> None:
    """Check that TensorRT and the GPU are those that the engines were built for.

    Raises
    ------
    ValueError
        If TensorRT is of another version, or the GPU of another compute capability.
    """
    if manifest.tensorrt != tensorrt:
        raise ValueError(
            f"{manifest.folder}: engines of TensorRT {manifest.tensorrt}, but this is TensorRT "
            f"{tensorrt}; build them again with less-cache export tensorrt"
        )
    if list(manifest.device["capability"]) != list(device["capability"]):
        raise ValueError(
            f"{manifest.folder}: engines for {_described(manifest.device)}, but this GPU is "
            f"{_described(device)}; build them again on it"
        )


def _described(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    return f"{device['name']} (compute capability {major}.{minor})"
