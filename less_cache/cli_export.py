"""``less-cache export``: models with their cache as files that other runtimes run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export = typer.Typer(no_args_is_help=True, help="Write a model with its cache for other runtimes.")


@export.callback()
def _formats() -> None:
    """Write a model with its cache for other runtimes."""


@export.command()
def onnx(
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: Annotated[
        str, typer.Option(help="Folder or hub id of the model, or 'reference': the shipped one.")
    ] = "reference",
    maps: Annotated[
        Path | None, typer.Option(help="Folder of feature maps; without: the policy alone, rank 0.")
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="Slots a head (52), or a share of the model's positions (0.05, 5%).")
    ] = "0.05",
    policy: Annotated[
        str, typer.Option(help="h2o, sinkwindow, tova, ... with fields; full: no eviction.")
    ] = "h2o",
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="Of ONNX: 20 to 23.")] = 23,
    layout: Annotated[
        str,
        typer.Option("--format", help="onnx: for OnnxDecoder; genai: for onnxruntime_genai.Model."),
    ] = "onnx",
) -> None:
    """Write one ONNX file for prompts, steps and later turns, and its weights beside it."""
    from ._checks import check_choice
    from .cli import _config, _load_model, console
    from .feature_maps import FeatureMaps

    check_choice("format", layout, ("onnx", "genai"))
    try:
        from exporters.onnx.export import export_decoder
        from exporters.onnx.genai import export_genai
    except ImportError as error:
        raise ImportError(f"{error}; install less_cache[onnx]") from None
    read = FeatureMaps.from_pretrained(maps) if maps is not None else None
    loaded, tokenizer = _load_model(model, "cpu", dtype)
    rank = read[0].rank if read is not None else 0
    config = _config(loaded, capacity, "fullcache" if policy == "full" else policy, rank)
    write = export_genai if layout == "genai" else export_decoder
    write(loaded, config, read, out, dtype=dtype, opset=opset, tokenizer=tokenizer)
    console.print(f"{config.bytes_per_sequence():,} bytes of cache a sequence, at any length.")
    console.print(f"Written: {out}")
