"""What decides how well a layer's maps fit: kind, rank, hidden size, rows, rate, text, policy.

Fits one layer of the reference model again and again, one number changed at a time, and notes the
validation error as a share of the policy's own, and the time an epoch takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from less_cache import reference_model
from less_cache._files import replaced, write_text
from less_cache.config import CacheConfig
from less_cache.policies import parse_policy
from less_cache.reference_model.shipped_maps import training_windows
from less_cache.training.collect import collect_layer
from less_cache.training.layer import fit_layer
from less_cache.training.recipe import Recipe
from less_cache.training.runs import Log

BASE = Recipe(
    kind="exp",
    hidden=128,
    epochs=8,
    rows=96,
    learning_rate=3e-3,
    schedule="cosine",
    dropout=0.0,
    validation=0.08,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "kind: paper": {"kind": "paper"},
    "kind: paper, dropout 0.3": {"kind": "paper", "dropout": 0.3},
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16},
    "rank 32": {"rank": 32},
    "hidden 32": {"hidden": 32},
    "hidden 512": {"hidden": 512},
    "rate 3e-4": {"learning_rate": 3e-4},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 1e-2": {"learning_rate": 1e-2},
    "epochs 2": {"epochs": 2},
    "epochs 24": {"epochs": 24},
    "half of the text": {"share": 0.5},
    "rows 24": {"rows": 24},
    "rows: all": {"rows": None},
    "policy h2o": {"policy": "h2o"},
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    layer: Annotated[int, typer.Option(help="Which layer.")] = 4,
    sequences: Annotated[int, typer.Option(help="Training and validation windows.")] = 200,
    capacity: Annotated[float, typer.Option(help="Share of the context.")] = 0.05,
    only: Annotated[str, typer.Option(help="Variants whose names contain this.")] = "",
) -> None:
    """Run the ablation and print its table."""
    model, _ = reference_model.load()
    tokens = training_windows(sequences)
    data: dict[str, Any] = {}
    results = []
    for name, changes in VARIANTS.items():
        if only not in name:
            continue
        changes = dict(changes)
        policy = changes.pop("policy", "sinkwindow")
        rank = changes.pop("rank", 8)
        share = changes.pop("share", 1.0)
        config = CacheConfig.from_model(
            model.config, capacity=capacity, policy=parse_policy(policy), rank=rank, dtype="float32"
        )
        spec = config.layer(layer)
        if policy not in data:
            data[policy] = collect_layer(model, tokens, layer, spec, batch=8)
        recipe = dataclasses.replace(BASE, **changes)
        used = _with_less_text(data[policy], recipe, share)
        if share < 1:
            kept = len(used.k)
            recipe = dataclasses.replace(
                recipe, validation=round(sequences * BASE.validation) / kept
            )
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            fit_layer(spec, used, recipe, Path(folder), layer)
            seconds = time.perf_counter() - started
            log = Log(Path(folder) / "log.jsonl", upto=2**62).read()
        errors = [entry["validation"] for entry in log]
        results.append(
            {
                "variant": name,
                "error_share": min(errors),
                "seconds_an_epoch": seconds / len(errors),
                "errors_by_epoch": errors,
            }
        )
    facts = {
        "layer": layer,
        "sequences": sequences,
        "capacity": capacity,
        "base": BASE.to_dict(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "results": results,
    }
    write_text(out / "ablation.json", json.dumps(facts, indent=1) + "\n")
    for name, draw in (("ablation", _draw), ("ablation_rows", _draw_rows)):
        with replaced(out / f"{name}.png") as temporary:
            draw(results).savefig(temporary, format="png", dpi=130)
    table = Table("variant", "error, share of the policy's", "seconds an epoch")
    for row in results:
        table.add_row(row["variant"], f"{row['error_share']:.3f}", f"{row['seconds_an_epoch']:.1f}")
    Console().print(table)


def _with_less_text(data: Any, recipe: Recipe, share: float) -> Any:
    """The first `share` of the training sequences, and all of validation's."""
    count = len(data.k)
    held = max(1, round(count * recipe.validation))
    kept = torch.arange(count)
    kept = torch.cat([kept[: round((count - held) * share)], kept[count - held :]])
    fields = ("q", "k", "v", "out", "times")
    return dataclasses.replace(data, **{name: getattr(data, name)[kept] for name in fields})


def _draw(results: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.34 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    base = results[0]["error_share"]
    for place, row in enumerate(results):
        better = row["error_share"] < base
        colour = "#8a8f98" if place == 0 else "#2f7d6b" if better else "#c4572e"
        axes.barh(place, row["error_share"], color=colour, height=0.65)
        axes.text(row["error_share"] + 0.01, place, f"{row['error_share']:.3f}", va="center")
    axes.axvline(base, color="#8a8f98", lw=1, ls="--")
    axes.set_yticks(range(len(results)), [row["variant"] for row in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("validation error, as a share of the policy's own (less is better)")
    axes.set_title("One number changed at a time", loc="left", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _draw_rows(results: list[dict[str, Any]]) -> Any:
    """Validation error against time: what sampling query rows buys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = {
        "rows 24": "24 rows",
        "base": "96 rows",
        "epochs 24": "96 rows, 24 epochs",
        "rows: all": "all rows",
    }
    for row in results:
        if row["variant"] in labels:
            errors = row["errors_by_epoch"]
            seconds = [row["seconds_an_epoch"] * (i + 1) for i in range(len(errors))]
            axes.plot(seconds, errors, marker=".", label=labels[row["variant"]])
    axes.set_xscale("log")
    axes.set_xlabel("seconds of fitting")
    axes.set_ylabel("validation error, share of the policy's")
    axes.set_title("Query rows a step", loc="left", fontsize=11)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


if __name__ == "__main__":
    typer.run(main)
