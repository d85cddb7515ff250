"""``less-cache export``: models with their cache as files that other runtimes run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .._checks import check_choice
from ..policies import DEFAULT_POLICY
from .given_cache import CacheOption, read_cache
from .loading import check_config, check_machine, config_for, load_model
from .options import SHIPPED, CapacityOption, ModelOption, PolicyOption, check_out, named_maps
from .quantized import (
    BitsOption,
    KeyBitsOption,
    TransformOption,
    TransformsOption,
    ValueBitsOption,
    read_codes,
)
from .telling import say

export = typer.Typer(no_args_is_help=True, help="Write a model with its cache for other runtimes.")


@export.callback()
def _formats() -> None:
    """Write a model with its cache for other runtimes."""


@export.command()
def onnx(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: ModelOption = SHIPPED,
    maps: Annotated[
        str | None,
        typer.Option(
            help="FOLDER, or NAME=FOLDER, of feature maps; without: the policy alone, rank 0."
        ),
    ] = None,
    cache: CacheOption = None,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = DEFAULT_POLICY,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    dtype: Annotated[str, typer.Option(help="float32, float16; bfloat16: TensorRT.")] = "float32",
    opset: Annotated[int, typer.Option(help="Of ONNX: 20 to 23.")] = 23,
    layout: Annotated[
        str,
        typer.Option("--format", help="onnx: for OnnxDecoder; genai: for onnxruntime_genai.Model."),
    ] = "onnx",
    inline: Annotated[
        bool,
        typer.Option("--inline", help="No functions in the file, for runtimes such as OpenVINO."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds something else, too.")
    ] = False,
) -> None:
    """Write one ONNX file for prompts, steps and later turns, and its weights beside it."""
    check_choice("format", layout, ("onnx", "genai"))
    if inline and layout == "genai":
        raise ValueError("inline: for --format onnx; onnxruntime-genai takes functions")
    try:
        from exporters.onnx.export import export_decoder
        from exporters.onnx.genai import export_genai
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install less_cache[onnx]") from None
    whole = read_cache(context, cache)
    policy = "fullcache" if policy == "full" else policy
    check_config(capacity, policy)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    check_machine("cpu", dtype)
    check_out(out)
    read = None if maps is None else next(iter(named_maps([maps]).values()))
    loaded, tokenizer = load_model(model, "cpu", dtype)
    if whole is None:
        config = config_for(loaded, capacity, policy, 0 if read is None else read.rank, codes)
    else:
        config, read, codes = whole.config_for(loaded), whole.recipe.maps, whole.codes
    options: dict[str, Any] = {
        "dtype": dtype,
        "opset": opset,
        "tokenizer": tokenizer,
        "force": force,
        "transforms": codes.transforms,
    }
    if layout == "genai":
        export_genai(loaded, config, read, out, **options)
    else:
        export_decoder(loaded, config, read, out, inline=inline, **options)
    say(f"{config.bytes_per_sequence():,} bytes of cache a sequence, at any length.")
    say(f"Written: {out}")


@export.command()
def tensorrt(
    onnx: Annotated[Path, typer.Option(help="The folder that less-cache export onnx wrote.")],
    out: Annotated[Path, typer.Option(help="The folder of the engines.")],
    plugin: Annotated[
        Path | None,
        typer.Option(help="The plugin's library; without: steps in standard operators, slower."),
    ] = None,
    alias: Annotated[
        bool, typer.Option(help="Tell TensorRT that the plugin updates the state in place.")
    ] = True,
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

    build_engines(
        onnx,
        out,
        max_batch=max_batch,
        max_prompt=max_prompt,
        opt_batch=opt_batch,
        opt_prompt=opt_prompt,
        plugin=plugin,
        alias=alias,
        workspace=workspace * 2**20 if workspace is not None else None,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        device=device,
        progress=not verbose,
        verbose=verbose,
    )
    say(f"Written: {out}")
