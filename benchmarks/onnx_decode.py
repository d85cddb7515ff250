"""Decoding in ONNX Runtime: LESS against full caches of the same model, on this CPU.

``python benchmarks/onnx_decode.py`` exports a Llama of the shipped model's shapes with random
weights three times: with LESS, with a full cache of fixed size by the same exporter, and with
onnxruntime-genai's own builder; and times one step of a batch after contexts of several lengths.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import free_bytes, spread, surroundings
from benchmarks.onnx_contestants import Exported, GenAI, build_genai, export_all, random_llama
from benchmarks.options import numbers
from less_cache.policies import parse_policy

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "less": ("LESS, OnnxDecoder", "#1f5fa8", "o"),
    "full": ("full cache, OnnxDecoder", "#b04a3a", "s"),
    "genai": ("full cache, onnxruntime-genai", "#d99a3d", "^"),
}
ROOM = 256
"""Slots of a full cache beyond its context: for the steps that are timed."""

TURNS = 3

console = Console()


def main(
    contexts: Annotated[str, typer.Option(help="Tokens a sequence.")] = "1024,4096,16384,65536",
    full_up_to: Annotated[
        int, typer.Option(min=0, help="Longest context of the full caches.")
    ] = 16384,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    capacity: Annotated[int, typer.Option(min=2, help="Slots of LESS.")] = 205,
    policy: Annotated[str, typer.Option(help="Of LESS.")] = "h2o",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank state.")] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="Of the feature maps.")] = 128,
    steps: Annotated[int, typer.Option(min=2, max=ROOM // 4, help="Timed steps a turn.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Of ONNX Runtime.")] = 1,
    genai: Annotated[bool, typer.Option(help="Time onnxruntime-genai too.")] = True,
    tiny: Annotated[bool, typer.Option(help="A tiny model, to try the benchmark.")] = False,
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS / "onnx_decode.json",
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Plot; default: beside the results.")
    ] = None,
) -> None:
    """Time decode steps of exported models."""
    lengths = numbers(contexts)
    model = random_llama(max(lengths) + ROOM, tiny)
    report: dict[str, Any] = surroundings()
    report["versions"]["onnxruntime"] = ort.__version__
    report["settings"] = {
        "batch": batch,
        "capacity": capacity,
        "policy": policy,
        "rank": rank,
        "hidden": hidden,
        "threads": threads,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folders = export_all(
            model,
            folder,
            capacity=capacity,
            policy=parse_policy(policy),
            rank=rank,
            hidden=hidden,
            contexts=[n for n in lengths if n <= full_up_to],
            room=ROOM,
        )
        built: Path | str = "not asked for"
        if genai:
            from less_cache.reference_model import load

            built = build_genai(model, load()[1], folder, threads)
        report["genai"] = "built" if isinstance(built, Path) else built
        report["results"] = [
            _measure(folders, built, context, batch, steps, threads) for context in lengths
        ]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=2) + "\n")
    _plot(report, png_file or json_file.with_suffix(".png"))
    console.print(_table(report))
    console.print(f"onnxruntime-genai: {report['genai']}")


def _measure(
    folders: dict[Any, Path],
    built: Path | str,
    context: int,
    batch: int,
    steps: int,
    threads: int,
) -> dict[str, Any]:
    less = Exported(folders["less"], context, batch, threads)
    calls: dict[str, Callable[[], None]] = {"less": less.step}
    row: dict[str, Any] = {"context": context, "less_bytes": less.bytes_per_sequence}
    if context in folders:
        full = Exported(folders[context], context, batch, threads)
        row["full_bytes"] = full.bytes_per_sequence
        calls["full"] = full.step
        if isinstance(built, Path) and free_bytes() > 4 * batch * row["full_bytes"]:
            calls["genai"] = GenAI(built, context, batch, ROOM).step
    for name, (seconds, busy) in _time(calls, steps).items():
        times = spread(seconds)
        row[name] = {
            **times,
            # What the processor spent: on a machine with other work, nearer to the truth.
            "cpu_ms": statistics.median(busy) * 1e3,
            "tokens_per_second": batch * 1e3 / times["median_ms"],
        }
    others = [row[name]["median_ms"] for name in ("full", "genai") if name in row]
    if others:
        row["faster_than_best_full"] = min(others) / row["less"]["median_ms"]
        row["faster_than_own_full"] = row["full"]["median_ms"] / row["less"]["median_ms"]
    return row


def _time(
    calls: dict[str, Callable[[], None]], steps: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each step, on the clock and of the processor, in turns of several steps.

    Whole turns, for a decoder steps again and again: a small model's weights stay in the
    processor's caches then, which a larger contestant in between would empty.
    """
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            call()
            for _ in range(steps):
                started, busy = time.perf_counter(), time.process_time()
                call()
                found[name][0].append(time.perf_counter() - started)
                found[name][1].append(time.process_time() - busy)
    return found


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="One decode step, median ms")
    for heading in ("context", *(label for label, _, _ in LABELS.values()), "faster", "bytes"):
        table.add_column(heading, justify="right")
    for row in report["results"]:
        faster = row.get("faster_than_own_full")
        full_bytes = row.get("full_bytes")
        table.add_row(
            f"{row['context']:,}",
            *(f"{row[name]['median_ms']:.2f}" if name in row else "–" for name in LABELS),
            f"{faster:.1f}×, {row['faster_than_best_full']:.1f}×" if faster else "–",
            f"{row['less_bytes'] / 1e6:.2f} MB"
            + (f" of {full_bytes / 1e6:.0f}" if full_bytes else ""),
        )
    return table


def _plot(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)
    for name, (label, colour, marker) in LABELS.items():
        rows = [row for row in report["results"] if name in row]
        if rows:
            axes.plot(
                [row["context"] for row in rows],
                [row[name]["tokens_per_second"] for row in rows],
                color=colour,
                marker=marker,
                label=label,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("tokens per second")
    settings, machine = report["settings"], report["machine"]
    axes.set_title(
        f"ONNX Runtime, {machine['cpu']}, {settings['threads']} thread(s), batch "
        f"{settings['batch']}, C = {settings['capacity']}",
        fontsize=8,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
