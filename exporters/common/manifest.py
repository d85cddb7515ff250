"""``less_cache.json``: what an exported folder holds, and the checks of a folder against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_cache.config import CacheConfig

from .fields import check_fields
from .folders import check_files, read_index

MANIFEST, MODEL, WEIGHTS = "less_cache.json", "model.onnx", "model.onnx.data"
FORMAT = "less_cache.onnx.2"
DTYPES = frozenset({"float32", "float16", "bfloat16", "uint8", "int32", "int64"})
COUNT = range(2**31)
FIELDS = {
    "config": dict,
    "maps_digest": (str, type(None)),
    "vocab_size": range(1, 2**31),
    "eos_token_ids": [COUNT],
    "bytes_per_sequence": range(1, 2**63),
    "all_logits": bool,
    "inputs": [str],
    "outputs": [str],
    "state": [{"name": str, "dtype": DTYPES, "shape": [range(1, 2**31)]}],
    "layers": [
        {
            "window": COUNT,
            "maps": (str, type(None)),
            "runs": [{"heads": [COUNT], "capacity": range(1, 2**31), "arrays": [str]}],
        }
    ],
    "files": dict,
}
"""What a reader needs of `MANIFEST`, as `check_fields` takes it."""


@dataclass(frozen=True)
class TensorSpec:
    """One array of the state: name without ``past.``, dtype, shape without the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What `MANIFEST` says.

    Attributes
    ----------
    folder : Path
        Where it was read from.
    config : CacheConfig
        That of the full-attention layers.
    state : tuple of TensorSpec
        The state's arrays, in the order of the model's inputs and outputs.
    vocab_size : int
    eos_token_ids : tuple of int
        Tokens that end a text.
    data : dict
        The whole manifest, as read from JSON.
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
    def largest_capacity(self) -> int:
        """The slots of the largest head of all layers, windows included."""
        return max(run["capacity"] for layer in self.data["layers"] for run in layer["runs"])

    @property
    def maps_digest(self) -> str | None:
        """`FeatureMaps.digest` of the maps inside; ``None`` at rank 0 everywhere."""
        return self.data["maps_digest"]

    @property
    def transforms_digest(self) -> str | None:
        """`Transforms.digest` of the bases inside; ``None`` where none are fitted."""
        return self.data.get("transforms_digest")

    @property
    def bytes_per_sequence(self) -> int:
        """What one sequence's state takes."""
        return int(self.data["bytes_per_sequence"])


def read_manifest(folder: str | Path, *, verify: bool = True) -> Manifest:
    """Read a folder's manifest, and check the folder against it.

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
        If the manifest is damaged or of another format, or a file is truncated or is another file.
    """
    folder = Path(folder)
    data = read_index(folder, MANIFEST, FORMAT, FIELDS, "less-cache export onnx")
    manifest = manifest_of(folder, data, str(folder / MANIFEST))
    # A model whose tensors are all small has no file of weights.
    wanted = [name for name in (MODEL, WEIGHTS) if name == MODEL or (folder / name).exists()]
    check_files(folder, MANIFEST, data["files"], wanted, verify)
    return manifest


def manifest_of(folder: Path, data: Any, where: str) -> Manifest:
    """A manifest from what `MANIFEST` of a folder holds.

    Parameters
    ----------
    folder
        The manifest's.
    data
        As `json.loads` gives it.
    where
        What errors begin with.

    Raises
    ------
    ValueError
        If a field is missing or has another form, or two do not fit each other.
    """
    check_fields(where, data, FIELDS)
    # Missing where the file is older than quantised slots.
    digest = data.get("transforms_digest")
    check_fields(f"{where}: transforms_digest", digest, (str, type(None)))
    try:
        config = CacheConfig.from_dict(data["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: config: {error}") from None
    full = sum(not layer["window"] for layer in data["layers"])
    if full != config.num_layers:
        raise ValueError(
            f"{where}: layers: {full} without a window, but config says {config.num_layers}"
        )
    state = [entry["name"] for entry in data["state"]]
    if missing := [f"past.{name}" for name in state if f"past.{name}" not in data["inputs"]]:
        raise ValueError(f"{where}: inputs: lacks {missing}, which state names")
    held = [name for layer in data["layers"] for run in layer["runs"] for name in run["arrays"]]
    if missing := [name for name in held if name not in state]:
        raise ValueError(f"{where}: state: lacks {missing}, which layers name")
    if idle := [index for index, layer in enumerate(data["layers"]) if not layer["runs"]]:
        raise ValueError(f"{where}: layers[{idle[0]}]: no runs of heads, expected at least one")
    return Manifest(
        folder=folder,
        config=config,
        state=tuple(
            TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
            for entry in data["state"]
        ),
        vocab_size=data["vocab_size"],
        eos_token_ids=tuple(data["eos_token_ids"]),
        data=data,
    )
