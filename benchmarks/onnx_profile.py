"""Where a LESS step's time goes in ONNX Runtime: ``python benchmarks/onnx_profile.py``."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.onnx_contestants import Exported, export_all, random_llama
from exporters.common.manifest import MODEL
from less_cache.policies import parse_policy

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
WARM_UP = 3

console = Console()


def main(
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    capacity: Annotated[int, typer.Option(min=2, help="Slots.")] = 205,
    policy: Annotated[str, typer.Option(help="Of the cache.")] = "h2o",
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank state.")] = 8,
    hidden: Annotated[int, typer.Option(min=1, help="Of the feature maps.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps to sum up.")] = 20,
    tiny: Annotated[bool, typer.Option(help="A tiny model, to try the script.")] = False,
) -> None:
    """Print each sort of operator's time in one step, on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = export_all(
            random_llama(4096, tiny),
            Path(scratch),
            capacity=capacity,
            policy=parse_policy(policy),
            rank=rank,
            hidden=hidden,
            contexts=[],
            room=0,
        )
        contestant = Exported(folders["less"], 4096, batch, threads=1)
        plain = []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            contestant.step()
            plain.append(time.perf_counter() - started)
        console.print(f"One step: {statistics.median(plain[WARM_UP:]) * 1e3:.2f} ms")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        contestant.decoder.session = session = ort.InferenceSession(
            str(folders["less"] / MODEL), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(WARM_UP + steps):
            contestant.step()
        events = json.loads(Path(session.end_profiling()).read_text())
    console.print(_table(events, steps))


def _table(events: list[dict[str, Any]], steps: int) -> Table:
    runs = [event for event in events if event["name"] == "model_run"][-steps:]
    begin = runs[0]["ts"]
    micros: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        # The time of a choice is that of what was chosen, which is listed by itself.
        if event["ts"] >= begin and event["args"]["op_name"] != "If":
            sort = _sort(event["args"])
            micros[sort] += event["dur"]
            count[sort] += 1
    table = Table(title="The same under the profiler, which adds its own to each node")
    for heading in ("operators", "nodes", "ms"):
        table.add_column(heading, justify="left" if heading == "operators" else "right")
    for sort, total in micros.most_common():
        table.add_row(sort, str(count[sort] // steps), f"{total / steps / 1e3:.2f}")
    return table


def _sort(args: dict[str, Any]) -> str:
    if args["op_name"] not in PRODUCTS:
        return "all others"
    shapes = [shape for entry in args["input_type_shape"] for shape in entry.values()]
    # Only the model's own weights have two dimensions; the profiler does not list constants.
    if len(shapes) == 1 or len(shapes[1]) == 2:
        return "products with the model's weights"
    if len(shapes[1]) == 3:
        return "products with the maps' weights"
    return "products with keys and values, H and z"


if __name__ == "__main__":
    typer.run(main)
