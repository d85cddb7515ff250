"""``less-cache bench``: what a decode step takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .._checks import check_choice
from ..quantization import TRANSFORMS, Quantization
from .given_cache import CacheOption, read_cache
from .options import parse_capacity
from .quantized import BitsOption, KeyBitsOption, ValueBitsOption, parse_bits

if TYPE_CHECKING:
    from ..evaluation.bench import Timing


CONTEXT = 8192


def bench(
    called: typer.Context,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens that the full cache holds; default: {CONTEXT}, or the positions of the "
            "model that --cache is for.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    query_heads: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 128,
    capacity: Annotated[
        str,
        typer.Option(
            help="Slots a head (52), a share of the context (0.05), or a JSON list of "
            "one a KV head."
        ),
    ] = "0.05",
    cache: CacheOption = None,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: Annotated[
        str, typer.Option(help="Basis of the codes: hadamard, or calibrated to random pairs.")
    ] = "hadamard",
) -> None:
    """Time one layer's decode step on every backend that this machine can run.

    With --cache the steps of all its layers, one after another.
    """
    whole = read_cache(called, cache)
    check_choice("transform", transform, TRANSFORMS)
    chosen = parse_bits(bits, key_bits, value_bits)
    import torch

    from ..evaluation.bench import bench_cache, bench_layer

    if whole is not None:
        recipe = whole.recipe
        context = context or recipe.config.max_positions or CONTEXT
        timings = bench_cache(
            recipe.config, recipe.maps, recipe.transforms, context=context, batch=batch
        )
        what = f"All {recipe.config.num_layers} layers of {whole.title}"
    else:
        context = context or CONTEXT
        what = "One layer"
        timings = bench_layer(
            context=context,
            batch=batch,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            capacity=parse_capacity(capacity),
            quantization=None if chosen is None else Quantization(*chosen, transform),
        )
    threads = torch.get_num_threads()
    title = f"{what}, one step: {context} tokens, batch {batch}, {threads} threads"
    Console().print(timings_table(timings, title))


def timings_table(timings: Sequence[Timing], title: str) -> Table:
    """What each cache's step took, for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("device")
    table.add_column("cache")
    for column in ("ms", "full / this", "bytes a sequence"):
        table.add_column(column, justify="right")
    full = {t.device: t.milliseconds for t in timings if t.cache == "full cache"}
    for timing in timings:
        table.add_row(
            timing.device,
            timing.cache,
            f"{timing.milliseconds:.3f}",
            f"{full[timing.device] / timing.milliseconds:.1f}",
            f"{timing.bytes_per_sequence:,}",
        )
    return table
