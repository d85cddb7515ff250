"""What decode steps of the shipped model take with its tuned caches, against the full cache.

::

    python benchmarks/tuned_decode.py --threads 1

The demo's caches and its measurement (`less_cache.evaluation.demo_speed`), for several batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import less_cache as lc
from benchmarks.measuring import surroundings
from benchmarks.options import numbers
from benchmarks.tables import for_a_page, for_terminal
from less_cache import reference_model
from less_cache.evaluation.demo import contestants_of
from less_cache.evaluation.demo_speed import measure_speed

BUDGETS = ("5%", "2.5%", "1.25%")
RESULTS = Path(__file__).parent / "results"


def measure(context: int, batches: list[int]) -> list[dict[str, Any]]:
    """Tokens a second of every cache, a row a batch."""
    model, tokenizer = reference_model.load()
    recipes = {b: lc.CacheRecipe.from_pretrained(reference_model.tuned(b)) for b in BUDGETS}
    contestants = contestants_of(model, recipes)
    text = "\n".join(document.text for document in reference_model.held_out_documents())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:context])
    rows = []
    for batch in batches:
        speeds = measure_speed(model, contestants, ids[None], batch=batch)
        found = {c.name: s.tokens_per_second for c, s in zip(contestants, speeds, strict=True)}
        rows.append({"context": context, "batch": batch, "tokens_per_second": found})
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    speeds = row["tokens_per_second"]
    full = next(iter(speeds.values()))
    told = [f"{speed:,.0f} ({speed / full:.2f})" for speed in speeds.values()]
    return [str(row["batch"]), f"{full:,.0f}", *told[1:]]


def main(
    context: Annotated[int, typer.Option(min=64, help="Tokens before the steps.")] = 4096,
    batches: Annotated[str, typer.Option(help="Sequences.")] = "1,8",
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's.")] = torch.get_num_threads(),
    json_file: Annotated[Path, typer.Option("--json", help="Results.")] = RESULTS
    / "tuned_decode.json",
) -> None:
    """Measure decoding with the caches that ship."""
    torch.set_num_threads(threads)
    around = surroundings()
    rows = measure(context, numbers(batches))
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps({**around, "results": rows}, indent=1) + "\n")
    headings = ["batch", *rows[0]["tokens_per_second"]]
    title = f"Tokens a second at {context:,} tokens (full caches)"
    Console().print(for_terminal(title, headings, map(cells, rows)))
    print("\n".join(for_a_page(headings, map(cells, rows))))


if __name__ == "__main__":
    typer.run(main)
