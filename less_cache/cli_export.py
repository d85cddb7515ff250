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
    dtype: Annotated[str, typer.Option(help="float32, float16; bfloat16: TensorRT.")] = "float32",
    opset: Annotated[int, typer.Option(help="Of ONNX: 20 to 23.")] = 23,
    layout: Annotated[
        str,
        typer.Option("--format", help="onnx: for OnnxDecoder; genai: for onnxruntime_genai.Model."),
    ] = "onnx",
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds something else, too.")
    ] = False,
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
    write(loaded, config, read, out, dtype=dtype, opset=opset, tokenizer=tokenizer, force=force)
    console.print(f"{config.bytes_per_sequence():,} bytes of cache a sequence, at any length.")
    console.print(f"Written: {out}")


@export.command()
def tensorrt(
    onnx: Annotated[Path, typer.Option(help="The folder that less-cache export onnx wrote.")],
    out: Annotated[Path, typer.Option(help="The folder of the engines.")],
    plugin: Annotated[
        Path | None,
        typer.Option(help="The plugin's library; without: steps in standard operators, slower."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="The most sequences at once.")] = 1,
    max_prompt: Annotated[int, typer.Option(help="The most tokens at once.")] = 512,
    opt_batch: Annotated[
        int | None, typer.Option(help="Sequences to tune for; default: the most.")
    ] = None,
    opt_prompt: Annotated[
        int | None, typer.Option(help="Tokens to tune for; default: the most.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="MiB of GPU memory a layer may use beside its tensors.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 to 5: how long to search for fast kernels.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernels' times, read and written.")
    ] = None,
    device: Annotated[int, typer.Option(help="Index of the GPU.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose", help="All that TensorRT says.")] = False,
) -> None:
    """Build a step's and a prompt's TensorRT engine from an exported model. Ctrl-C ends it."""
    from exporters.tensorrt import build_engines

    from .cli import console

    build_engines(
        onnx,
        out,
        max_batch=max_batch,
        max_prompt=max_prompt,
        opt_batch=opt_batch,
        opt_prompt=opt_prompt,
        plugin=plugin,
        workspace=workspace * 2**20 if workspace is not None else None,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        device=device,
        progress=not verbose,
        verbose=verbose,
    )
    console.print(f"Written: {out}")
