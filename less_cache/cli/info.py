"""``less-cache info``: what this machine can run, and what maps are."""

from __future__ import annotations

import importlib.util
import platform
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..backends import BACKENDS
from ..provenance import slots_text, trained_for
from .options import named_maps

OPTIONAL = ("transformers", "triton", "onnxruntime", "tensorrt", "datasets", "matplotlib")


def info(
    maps: Annotated[
        list[str] | None, typer.Option(help="Describe this FOLDER, or NAME=FOLDER, of maps.")
    ] = None,
) -> None:
    """Tell what this machine can run, and what a folder of maps holds."""
    described = named_maps(maps or [])
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
        row("method", str(entry.record.get("method", "unknown")))
        row("digest", entry.digest)
    Console().print(table)
