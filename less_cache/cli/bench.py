"""``less-cache bench``: what a decode step takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .._checks import check_choice
from ..quantization import TRANSFORMS, Quantization
from .options import parse_capacity
from .quantized import BitsOption, KeyBitsOption, ValueBitsOption, parse_bits

if TYPE_CHECKING:
    from ..evaluation.bench import Timing


def bench(
    context: Annotated[int, typer.Option(min=1, help="Tokens that the full cache holds.")] = 8192,
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
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: Annotated[
        str, typer.Option(help="Basis of the codes: hadamard, or calibrated to random pairs.")
    ] = "hadamard",
) -> None:
    """Time one layer's decode step on every backend that this machine can run."""
    check_choice("transform", transform, TRANSFORMS)
    chosen = parse_bits(bits, key_bits, value_bits)
    import torch

    from ..evaluation.bench import bench_layer

    timings = bench_layer(
        context=context,
        batch=batch,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=parse_capacity(capacity),
        quantization=None if chosen is None else Quantization(*chosen, transform),
    )
    title = (
        f"One layer, one step: {context} tokens, batch {batch}, {torch.get_num_threads()} threads"
    )
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
