"""Measure how fast a decode step is, and how large the cache, against a full one.

One decoder of about 30 million random weights (`examples.custom_loop`, in float32) runs with each
cache in turn; the cache and its attention are all that differs:

- ``less``: this library;
- ``rank0``: the same eviction policy without the low-rank state;
- ``dynamic``, ``static``: transformers' caches with PyTorch's fused attention.

    python benchmarks/decode.py --contexts 1024,8192 --batches 1,8
    python benchmarks/decode.py --contexts 8192 --batches 8 --bits 2,3,4,8

With ``--bits``, coded slots are compared with float32 slots instead.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

# The repository's root, so that this also runs as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decode_bits
from benchmarks.contestants import Contestant, Dynamic, Less, Static, full_bytes
from benchmarks.decode_report import markdown, plot, table
from benchmarks.measuring import free_bytes, interleaved, spread, surroundings
from benchmarks.options import numbers
from benchmarks.packing import pack
from examples.custom_loop import Decoder, Shape
from less_cache.policies import Policy, parse_policy

MODEL = Shape(
    vocabulary=8192,
    layers=8,
    hidden=512,
    intermediate=1408,
    query_heads=4,
    kv_heads=4,
    head_dim=128,
)
TINY = Shape(vocabulary=64, layers=2, hidden=32, intermediate=64, query_heads=2, kv_heads=2)
MEMORY_SHARE = 0.6
"""The share of the free memory that the caches of one measurement may take."""
SHORT, LONG = 1024, 65536
"""The contexts between which a step's cost should not change."""
PACKED_ROWS = 8
"""The batch that the packed weights are laid out for."""
RESULTS = Path(__file__).parent / "results"


def slots(capacity: float, context: int) -> int:
    """A count of slots, or a share of the context."""
    return max(2, round(capacity * context)) if capacity < 1 else int(capacity)


class Bench:
    """The model and the settings that all measurements share."""

    def __init__(
        self,
        shape: Shape,
        *,
        capacity: float,
        policy: Policy,
        rank: int,
        hidden: int,
        steps: int,
        compiled: bool,
        packed: bool,
    ) -> None:
        torch.manual_seed(0)
        self.decoder = Decoder(shape).eval()
        self.parameters = sum(weight.numel() for weight in self.decoder.parameters())
        self.packed = packed and not compiled
        if self.packed:
            pack(self.decoder, PACKED_ROWS)
        self.shape, self.capacity, self.policy = shape, capacity, policy
        self.rank, self.hidden, self.steps, self.compiled = rank, hidden, steps, compiled

    def less(self, context: int, batch: int, rank: int, **changes: Any) -> Less:
        """The cache of this library at that length; `changes` are parameters of `Less`."""
        settings = {"capacity": slots(self.capacity, context), "policy": self.policy}
        settings |= {"rank": rank, "hidden": self.hidden}
        return Less(self.shape, context, batch, **{**settings, **changes})

    def time(
        self, contestants: dict[str, tuple[Contestant, int]], batch: int, steps: int
    ) -> dict[str, list[float]]:
        """Seconds a step of each; a contestant comes with its context."""
        tokens = torch.zeros(batch, 1, dtype=torch.int64)

        def step(contestant: Contestant, context: int) -> Callable[[], object]:
            def run() -> object:
                return self.decoder(tokens, context - 1, contestant.attend)

            return torch.compile(run) if self.compiled else run

        with torch.inference_mode():
            return interleaved(
                {name: step(*entry) for name, entry in contestants.items()},
                steps,
                before={name: entry[0].rewind for name, entry in contestants.items()},
            )

    def measure(self, context: int, batch: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One row of the table, and what was left out of it."""
        contestants: dict[str, Contestant] = {
            "less": self.less(context, batch, self.rank),
            "rank0": self.less(context, batch, 0),
        }
        budget = MEMORY_SHARE * free_bytes()
        need = full_bytes(self.shape, context, batch)
        skipped = []
        # The static cache first: it is the faster one, should there be room for one alone.
        for name, kind in (("static", Static), ("dynamic", Dynamic)):
            # While it is filled or grows, a cache holds one layer twice.
            peak = need + 2 * need // self.shape.layers
            if peak > budget:
                skipped.append(
                    {
                        "context": context,
                        "batch": batch,
                        "cache": name,
                        "reason": f"{peak / 1e9:.1f} GB would not fit into "
                        f"{MEMORY_SHARE:.0%} of the free memory ({budget / 1e9:.1f} GB left of it)",
                    }
                )
                continue
            contestants[name] = kind(self.shape, context, batch)
            budget -= need
        seconds = self.time(
            {name: (contestant, context) for name, contestant in contestants.items()},
            batch,
            self.steps,
        )
        row: dict[str, Any] = {"context": context, "batch": batch}
        for name, contestant in contestants.items():
            timing = spread(seconds[name])
            row[name] = {
                **timing,
                "tokens_per_second": batch / timing["median_ms"] * 1e3,
                "bytes": contestant.nbytes,
            }
        full = [row[name]["median_ms"] for name in ("static", "dynamic") if name in row]
        row["full_bytes"] = need
        row["ratio_to_best_full"] = min(full) / row["less"]["median_ms"] if full else None
        return row, skipped

    def constancy(self, context: int, batch: int) -> dict[str, float]:
        """What LESS's step costs at 64k against 1k, and with the low-rank state against without."""
        seconds = self.time(
            {
                "short": (self.less(SHORT, batch, self.rank), SHORT),
                "long": (self.less(LONG, batch, self.rank), LONG),
                "less": (self.less(context, batch, self.rank), context),
                "rank0": (self.less(context, batch, 0), context),
            },
            batch,
            4 * self.steps,
        )
        median = {name: spread(values)["median_ms"] for name, values in seconds.items()}
        return {
            "step_64k_over_1k": median["long"] / median["short"],
            "less_over_rank0": median["less"] / median["rank0"],
        }


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row to quote: 8k at batch 8, else the largest where a full cache was measured."""
    measured = [row for row in rows if row["ratio_to_best_full"] is not None] or rows
    return max(
        measured,
        key=lambda row: (
            (row["context"], row["batch"]) == (8192, 8),
            row["context"] * row["batch"],
            row["context"],
        ),
    )


def main(
    contexts: Annotated[str, typer.Option(help="Tokens a sequence.")] = "1k,2k,4k,8k,16k,32k,64k",
    batches: Annotated[str, typer.Option(help="Sequences.")] = "1,8,16",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each cache.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's.")] = torch.get_num_threads(),
    policy: Annotated[str, typer.Option(help="Such as h2o or sinkwindow:sinks=4.")] = "h2o",
    capacity: Annotated[
        float, typer.Option(min=0, help="Slots; below 1: a share of each context.")
    ] = 410,
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank state.")] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="Of the feature maps.")] = 128,
    bits: Annotated[
        str | None,
        typer.Option(help="Compare slots of so many bits, such as 2,3,4,8, with float32."),
    ] = None,
    transform: Annotated[str, typer.Option(help="Of the coded pairs.")] = "hadamard",
    backend: Annotated[str, typer.Option(help="That runs coded slots.")] = "inductor",
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile, for all of them.")
    ] = False,
    pack_: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Packed linear layers, for all of them.")
    ] = torch.backends.mkldnn.is_available(),
    tiny: Annotated[bool, typer.Option(help="A tiny model, to try the benchmark.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Results; default: in benchmarks/results.")
    ] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Plot; default: beside the results.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table in Markdown.")
    ] = False,
    from_json: Annotated[
        bool, typer.Option(help="Measure nothing: show and plot what --json holds.")
    ] = False,
) -> None:
    """Measure decoding with LESS against full caches."""
    # The terminal's report goes to stderr where stdout is Markdown to be kept.
    console = Console(stderr=as_markdown)
    json_file = json_file or RESULTS / ("decode.json" if bits is None else "decode_bits.json")
    if from_json:
        report = json.loads(json_file.read_text())
    else:
        torch.set_num_threads(threads)
        bench = Bench(
            TINY if tiny else MODEL,
            capacity=capacity,
            policy=parse_policy(policy),
            rank=rank,
            hidden=hidden,
            steps=steps,
            compiled=compile_,
            packed=pack_,
        )
        if bits is None:
            report = run(bench, numbers(contexts), numbers(batches), policy, console)
        else:
            rows = []
            for context, batch in itertools.product(numbers(contexts), numbers(batches)):
                rows += decode_bits.measure_bits(
                    bench, context, batch, numbers(bits), transform, backend
                )
            report = {**surroundings(), "transform": transform, "backend": backend, "results": rows}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if bits is not None:
        console.print(decode_bits.table(report))
        if as_markdown:
            print(decode_bits.markdown(report))
        return
    plot(report, png_file or json_file.with_suffix(".png"))
    console.print(table(report))
    if as_markdown:
        print(markdown(report))


def run(
    bench: Bench, contexts: list[int], batches: list[int], policy: str, console: Console
) -> dict[str, Any]:
    """All measurements, as what the JSON file holds."""
    around = surroundings()
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(contexts) * len(batches) + 1)
        for batch in batches:
            for context in contexts:
                progress.update(task, description=f"batch {batch}, context {context}")
                row, left_out = bench.measure(context, batch)
                rows.append(row)
                skipped += left_out
                gc.collect()
                progress.advance(task)
        best = headline(rows)
        progress.update(task, description="constancy")
        constancy = bench.constancy(best["context"], best["batch"])
        progress.advance(task)
    return {
        "ratio_to_best_full": best["ratio_to_best_full"],
        "ratio_at": {"context": best["context"], "batch": best["batch"]},
        **constancy,
        "settings": {
            "policy": policy,
            "capacity": bench.capacity,
            "rank": bench.rank,
            "hidden": bench.hidden,
            "steps": bench.steps,
            "compile": bench.compiled,
            "pack": bench.packed,
            "dtype": "float32",
        },
        "model": {"parameters": bench.parameters, **vars(bench.shape)},
        **around,
        "results": rows,
        "skipped": skipped,
    }


if __name__ == "__main__":
    typer.run(main)
