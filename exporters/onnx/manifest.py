"""``less_cache.json``: what an exported folder holds, and the checks of a folder against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_cache.config import CacheConfig

MANIFEST, MODEL, WEIGHTS = "less_cache.json", "model.onnx", "model.onnx.data"
FORMAT = "less_cache.onnx.1"
FIELDS = ("format", "config", "inputs", "outputs", "state", "layers", "files", "vocab_size")


@dataclass(frozen=True)
class TensorSpec:
    """One array of the state: dtype, and shape without the batch axis; its name lacks ``past.``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What `MANIFEST` says.

    Attributes
    ----------
    folder : Path
        Where it was read.
    config : CacheConfig
        Of the full-attention layers.
    state : tuple of TensorSpec
        The state's arrays, in the order of the model's inputs and outputs.
    vocab_size : int
    eos_token_ids : tuple of int
        Tokens that end a text.
    data : dict
        All of it, as JSON has it.
    """

    folder: Path
    config: CacheConfig
    state: tuple[TensorSpec, ...]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    data: dict[str, Any]

    @property
    def full_layers(self) -> list[int]:
        """The model's layers that `config` counts; the others have a sliding window."""
        return [i for i, layer in enumerate(self.data["layers"]) if not layer["window"]]

    @property
    def maps_digest(self) -> str | None:
        """`FeatureMaps.digest` of the maps inside; ``None`` at rank 0."""
        return self.data["maps_digest"]

    @property
    def bytes_per_sequence(self) -> int:
        """What one sequence's state takes."""
        return int(self.data["bytes_per_sequence"])


def read_manifest(folder: str | Path, *, verify: bool = True) -> Manifest:
    """Read a folder's manifest, and see that the folder holds what it says.

    Parameters
    ----------
    folder
        What `export_decoder` wrote.
    verify
        Read every file to the end and compare its digest; otherwise only the sizes.

    Raises
    ------
    FileNotFoundError
        If the manifest or a file that it names is missing.
    ValueError
        If the manifest is damaged or of another format, or a file is truncated or another one.
    """
    folder = Path(folder)
    writer = "less-cache export onnx"
    return manifest_of(folder, read_index(folder, MANIFEST, FORMAT, FIELDS, writer, verify))


def read_index(
    folder: Path, name: str, kind: str, fields: Sequence[str], writer: str, verify: bool
) -> dict[str, Any]:
    """Read the JSON that lists a folder's files, and see that they are those.

    Parameters
    ----------
    folder
        Has it.
    name, kind
        Of the JSON; what its ``format`` has to be.
    fields
        What it must have.
    writer
        The command that writes such folders.
    verify
        Read every file to the end and compare its digest; otherwise only the sizes.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_manifest`.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {writer} writes it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else data
        raise ValueError(f"{path}: format {found!r}, expected {kind!r}")
    if missing := [field for field in fields if field not in data]:
        raise ValueError(f"{path}: lacks {missing}")
    for file, wanted in data["files"].items():
        check_file(folder / file, wanted, name, verify)
    return data


def manifest_of(folder: Path, data: dict[str, Any]) -> Manifest:
    """A manifest from what `MANIFEST` of a folder holds."""
    return Manifest(
        folder=folder,
        config=CacheConfig.from_dict(data["config"]),
        state=tuple(
            TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
            for entry in data["state"]
        ),
        vocab_size=data["vocab_size"],
        eos_token_ids=tuple(data["eos_token_ids"]),
        data=data,
    )


def check_session(manifest: Manifest, inputs: list[Any], outputs: list[Any]) -> None:
    """See that a session's inputs and outputs are those of the manifest.

    Parameters
    ----------
    manifest
        From `read_manifest`.
    inputs, outputs
        ``session.get_inputs()``, ``session.get_outputs()``.

    Raises
    ------
    ValueError
        If a tensor is missing or unknown, or has another dtype or shape.
    """
    path = manifest.folder / MODEL
    for wanted, given in (("inputs", inputs), ("outputs", outputs)):
        names, found = manifest.data[wanted], {node.name for node in given}
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{path}: lacks the {wanted} {missing}, which {MANIFEST} names")
        if unknown := sorted(found - set(names)):
            raise ValueError(f"{path}: has the {wanted} {unknown}, which {MANIFEST} does not name")
    by_name = {node.name: node for node in inputs}
    for spec in manifest.state:
        node = by_name[f"past.{spec.name}"]
        found_shape = tuple(node.shape[1:])
        if found_shape != spec.shape or node.type != _TYPES[spec.dtype]:
            raise ValueError(
                f"{path}: past.{spec.name} is {node.type} {found_shape} for each sequence, but "
                f"{MANIFEST} says {spec.dtype} {spec.shape}"
            )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


def check_file(path: Path, wanted: dict[str, Any], manifest: str, verify: bool) -> None:
    """See that a file has the size, and if `verify` the digest, that a manifest says.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, or another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, though {manifest} names it")
    size = path.stat().st_size
    if size != wanted["bytes"]:
        word = "truncated" if size < wanted["bytes"] else "another file"
        raise ValueError(f"{path}: {word}: {size} bytes, but {manifest} says {wanted['bytes']}")
    if verify and digest(path) != wanted["sha256"]:
        raise ValueError(f"{path}: not the file that {manifest} was written for (SHA-256 differs)")


def refuse_bfloat16(manifest: Manifest) -> None:
    """Refuse a model that ONNX Runtime has no kernels for.

    Raises
    ------
    ValueError
        If its dtype is bfloat16.
    """
    if manifest.config.dtype == "bfloat16":
        raise ValueError(
            f"{manifest.folder}: a bfloat16 model, which ONNX Runtime cannot run; export float32 "
            "or float16 for it. This one is for exporters.tensorrt.build_engines"
        )
