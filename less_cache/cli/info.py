"""``less-cache info``: what this machine can run, and what maps are."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..backends import BACKENDS
from ..provenance import codes_text, ranks_text, slots_text, trained_for
from .options import named_maps
from .quantized import load_transforms

OPTIONAL = ("transformers", "triton", "onnxruntime", "tensorrt", "datasets", "matplotlib")


def info(
    maps: Annotated[
        list[str] | None, typer.Option(help="Describe this FOLDER, or NAME=FOLDER, of maps.")
    ] = None,
    transforms: Annotated[
        Path | None, typer.Option(help="Describe what less-cache calibrate wrote there.")
    ] = None,
) -> None:
    """Tell what this machine can run, and what maps and transforms hold."""
    described = named_maps(maps or [])
    bases = None if transforms is None else load_transforms(transforms)
    table = Table(show_header=False, box=None)

    def row(name: str, text: str) -> None:
        # As text: paths and names may look like markup.
        table.add_row(name, Text(text))

    row("less_cache", __version__)
    row("python", f"{platform.python_version()} on {platform.system()}")
    row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    row("GPUs", ", ".join(gpus) or "none")
    row("backends", ", ".join(BACKENDS))
    found = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    row("optional packages", ", ".join(found) or "none")
    for name, entry in described.items():
        config = trained_for(entry)
        row("maps", f"{name}: {entry!r}")
        row("for the model", str(entry.model_id))
        if config is not None:
            row("for the policy", ", ".join(sorted({str(policy) for policy in config.policies})))
            row("for the capacity", slots_text(config.capacity))
            row("for the rank", ranks_text(config.rank))
            row("for pairs stored", codes_text(config.quantization))
        row("method", str(entry.record.get("method", "unknown")))
        row("digest", entry.digest)
    if bases is not None:
        held = [layer for layer in bases if layer is not None]
        heads, size, _ = held[0].key_in.shape
        few = "" if len(held) == len(bases) else f"{len(held)} of "
        row("transforms", f"{bases.kind}, {few}{len(bases)} layers of {heads} KV heads of {size}")
        row(
            "for bits",
            f"{ranks_text(bases.key_bits)} of keys, {ranks_text(bases.value_bits)} of values",
        )
        row("digest", bases.digest)
    Console().print(table)
