"""Perplexity for bytes: tuned caches beside every policy at the same bytes, in one run.

On the shipped reference model and text that it never saw: its held-out modules, or, of another kind
than any cache was tuned on, Python's documentation as `help()` shows it. The gap is what H2O alone
loses with 52 slots of 16 bits; the interval draws documents with replacement.

    python benchmarks/budgets.py --windows 24
    python benchmarks/budgets.py --windows 320 --only tuned --name budgets_all
    python benchmarks/budgets.py --text documentation --name budgets_documentation

A run that was stopped goes on: what is scored is kept beside the result.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

# The repository's root, so that this also runs as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import less_cache as lc
from benchmarks.measuring import surroundings
from benchmarks.tables import for_a_page, for_terminal
from less_cache import reference_model
from less_cache._files import json_text, write_text
from less_cache.evaluation.perplexity import (
    Contestant,
    Scores,
    Window,
    cut_windows,
    recovery,
    score,
    spread_over,
)
from less_cache.reference_model.shipped_maps import shipped
from less_cache.training.data import tokenize
from less_cache.training.runs import load_checkpoint, save_checkpoint
from less_cache.tuning.budget import parse_budget
from less_cache.tuning.candidates import SIMPLE, equal_slots
from less_cache.tuning.judging import digest_of_cache

RESULTS = Path(__file__).parent / "results"
GAP_SLOTS = 52
FULL, WORST = "full cache", "H2O, 52 slots"
PEERS: tuple[tuple[str, lc.Policy, lc.Quantization | None], ...] = (
    *SIMPLE,
    ("TOVA", lc.TOVA(), None),
    ("SnapKV-like", lc.ObservationWindow(), None),
)
Documents = list[tuple[str, torch.Tensor]]
HEADINGS = ("share", "cache", "bytes a sequence", "perplexity", "gap won back", "95 %")


def contestants(model: Any, budget: str, only: str) -> list[Contestant]:
    """The tuned cache of a budget, and every other one in as many bytes."""
    tuned = lc.CacheRecipe.from_pretrained(reference_model.tuned(budget))
    own = tuned.config.with_dtype(model.dtype)
    found = [Contestant("tuned", own, tuned.maps, tuned.transforms)]
    if only == "tuned":
        return found
    shapes = lc.CacheConfig.from_model(
        model.config, capacity=64, policy=lc.SinkWindow(), rank=0, dtype="float16"
    )
    total = parse_budget(budget, shapes, model.config.max_position_embeddings)
    for name, policy, codes in PEERS:
        shaped = shapes.replace(policy=policy, quantization=codes)
        slots = equal_slots(shaped, total)
        config = shaped.replace(capacity=slots, dtype=model.dtype)
        found.append(Contestant(name, config))
    for policy, name in ((lc.H2O(), "h2o"), (lc.SinkWindow(), "sinkwindow")):
        maps = shipped(name, 0.05)
        shaped = shapes.replace(policy=policy, rank=maps.rank)
        slots = equal_slots(shaped, total)
        if slots > 8:
            config = shaped.replace(capacity=slots, dtype=model.dtype)
            found.append(Contestant(f"LESS on {name}", config, maps))
    return found


def documents_of(text: str, tokenizer: Any, vocabulary: int, length: int) -> Documents:
    """Names and tokens of all documents that are long enough."""
    if text == "modules":
        named = [(d.name, d.text) for d in reference_model.held_out_documents()]
    elif text == "documentation":
        named = sorted(pydoc_data.topics.topics.items())
    else:
        raise typer.BadParameter(f"--text: got {text!r}, expected modules or documentation")
    found = tokenize(named, tokenizer, vocabulary=vocabulary)
    return [(name, ids) for name, ids in found if len(ids) >= length]


def scored(
    model: Any, windows: list[Window], contestant: Contestant, kept: Path, batch: int
) -> Scores:
    """Its scores, from a file where they are there."""
    path = kept / f"{digest_of_cache(contestant)}.safetensors"
    found = load_checkpoint(path)
    if found is None:
        scores = score(model, windows, contestant, batch=batch)
        save_checkpoint(path, {"losses": torch.stack(scores.losses)}, {})
        return scores
    documents = [window.document for window in windows]
    return Scores(contestant, [*found[0]["losses"]], documents)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bytes, a line a cache."""
    from matplotlib.figure import Figure

    whole, full = rows[0]["bytes"], rows[0]["perplexity"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        lines.setdefault(row["cache"], []).append((row["bytes"] / whole, row["perplexity"]))
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(full, color="#1d2228", lw=1, ls=":")
    axes.text(0.0135, full, "full cache", va="bottom", fontsize=8.5, color="#1d2228")
    markers = iter("os^vDP*Xdph<>")
    for name, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        ours = name == "tuned"
        axes.plot(
            x,
            y,
            marker="o" if ours else next(markers),
            color="#2f7d6b" if ours else None,
            lw=2.6 if ours else 1.1,
            ms=6 if ours else 4,
            alpha=1 if ours else 0.75,
            label=name,
            zorder=3 if ours else 2,
        )
    shares = sorted({round(point[0], 4) for line in lines.values() for point in line})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([0.0125, 0.025, 0.05], ["1.25 %", "2.5 %", "5 %"])
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlim(min(shares) * 0.92, max(shares) * 1.08)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:.0f}")
    axes.set_xlabel("bytes a sequence, as a share of the full cache's in 16 bits")
    axes.set_ylabel("perplexity, held-out modules")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncol=2)
    figure.savefig(path, format="png", dpi=140)


def main(
    windows: Annotated[int, typer.Option(help="Held-out windows, spread over all.")] = 24,
    budgets: Annotated[str, typer.Option(help="Shares that a tuned cache ships for.")] = (
        "5%,2.5%,1.25%"
    ),
    only: Annotated[str, typer.Option(help="tuned: no other caches.")] = "",
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 32,
    text: Annotated[str, typer.Option(help="modules or documentation.")] = "modules",
    name: Annotated[str, typer.Option(help="Of the result's files.")] = "budgets",
) -> None:
    """Score everything and write the table."""
    model, tokenizer = reference_model.load()
    length = model.config.max_position_embeddings
    documents = documents_of(text, tokenizer, model.config.vocab_size, length)
    cut = cut_windows(documents, length)
    cut = spread_over(cut, windows)
    shapes = lc.CacheConfig.from_model(
        model.config, capacity=GAP_SLOTS, policy=lc.H2O(), rank=0, dtype="float16"
    )
    kept = RESULTS / f".scores-{text}-{len(cut)}"
    full = scored(model, cut, Contestant(FULL), kept, batch)
    worst = scored(
        model,
        cut,
        Contestant(WORST, shapes.with_dtype(model.dtype)),
        kept,
        batch,
    )
    whole = shapes.full_cache_bytes(length, "float16")
    rows: list[dict[str, Any]] = []

    def add(share: str, own: Scores, nbytes: int) -> None:
        won = recovery(full, worst, own)
        rows.append(
            {
                "share": share,
                "cache": own.contestant.name,
                "bytes": nbytes,
                "perplexity": own.perplexity(),
                "won": None if won is None else [won.share, won.low, won.high],
            }
        )

    add("100%", full, whole)
    add("", worst, shapes.bytes_per_sequence())
    for budget in budgets.split(","):
        for contestant in contestants(model, budget, only):
            assert contestant.config is not None
            own = scored(model, cut, contestant, kept, batch)
            add(budget, own, contestant.config.bytes_per_sequence("float16"))
    lines = [
        (
            row["share"],
            row["cache"],
            f"{row['bytes']:,}",
            f"{row['perplexity']:.2f}",
            "" if row["won"] is None else f"{row['won'][0]:.1%}",
            "" if row["won"] is None else f"{row['won'][1]:.1%} to {row['won'][2]:.1%}",
        )
        for row in rows
    ]
    facts = {
        "text": text,
        "windows": len(cut),
        "window": length,
        "documents": len({w.document for w in cut}),
    }
    write_text(
        RESULTS / f"{name}.json",
        json_text({**surroundings(), **facts, "rows": rows}, indent=2) + "\n",
    )
    write_text(RESULTS / f"{name}.md", "\n".join(for_a_page(HEADINGS, lines)) + "\n")
    if not only:
        draw(rows, RESULTS / f"{name}.png")
    Console(width=120).print(for_terminal(f"{len(cut)} windows of {text}", HEADINGS, lines))


if __name__ == "__main__":
    typer.run(main)
