"""``less_cache.json``: what an exported folder holds, and the checks of a folder against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_cache.config import CacheConfig

from .folders import read_index

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
