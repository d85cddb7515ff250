"""``less-cache info``: what this machine can run, and what maps and whole caches are."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..backends import BACKENDS
from ..config import CacheConfig
from ..provenance import codes_text, ranks_text, slots_text, trained_for
from ..recipe import CacheRecipe, policies_text
from .given_cache import load_cache
from .options import named_maps
from .quantized import load_transforms
from .telling import say

ABOUT_MODEL = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
"""Of a model's description: the rest is in the shapes."""
LONGEST = 300
"""Characters of an entry of a record: the file has all of it."""
OPTIONAL = ("transformers", "triton", "onnxruntime", "tensorrt", "datasets", "matplotlib")


def info(
    maps: Annotated[
        list[str] | None, typer.Option(help="Describe this FOLDER, or NAME=FOLDER, of maps.")
    ] = None,
    transforms: Annotated[
        Path | None, typer.Option(help="Describe what less-cache calibrate wrote there.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Describe this folder or hub id of a whole cache.")
    ] = None,
) -> None:
    """Tell what this machine can run, and what maps, transforms and a whole cache hold."""
    described = named_maps(maps or [])
    whole = None if cache is None else load_cache(cache)
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
    for name, text in () if whole is None else cache_lines(whole):
        row(name, text)
    Console().print(table)
    if whole is not None:
        for line in slots_by_head(whole.config):
            say(line)


def cache_lines(recipe: CacheRecipe) -> Iterator[tuple[str, str]]:
    """What a whole cache is, by name."""
    config = recipe.config
    sizes = f"{config.num_layers} layers of {config.kv_heads} KV heads of {config.head_dim}"
    yield "cache", sizes
    name = recipe.model.get("name")
    about = [f"{key} = {value!r}" for key, value in recipe.model.items() if key in ABOUT_MODEL]
    yield "for the model", ", ".join([name or "of no name", *about])
    yield "policy", policies_text(config)
    yield "slots a head", slots_text(config.capacity)
    yield "pairs stored", codes_text(config.quantization)
    if recipe.transforms is not None:
        yield "their bases", recipe.transforms.digest
    yield "low-rank state", f"rank {ranks_text(config.rank)}" if config.has_state else "none"
    if recipe.maps is not None:
        yield "its maps", f"{recipe.maps!r}, {recipe.maps.digest}"
    share = ""
    if recipe.share is not None:
        longest = config.max_positions
        share = f", {recipe.share:.2%} of the full cache's in 16 bits at {longest:,} tokens"
    yield "bytes a sequence", f"{recipe.bytes_per_sequence:,}{share}"
    for key, value in recipe.record.items():
        text = value if isinstance(value, str) else json.dumps(value)
        yield key, text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    yield "digest", recipe.digest


def slots_by_head(config: CacheConfig) -> Iterator[str]:
    """Lines of a table of slots: a layer a line, a KV head a column."""
    width = max(len(str(slots)) for layer in config.capacities for slots in layer)
    width = max(width, len(str(config.kv_heads - 1))) + 2
    yield ""
    yield "slots by KV head" + "".join(f"{head:>{width}}" for head in range(config.kv_heads))
    for index, layer in enumerate(config.capacities):
        yield f"layer {index:<10}" + "".join(f"{slots:>{width}}" for slots in layer)
