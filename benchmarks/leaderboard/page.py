"""The leaderboard's figures, its table and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import for_a_page
from less_cache.evaluation.intervals import Estimate, drawn_documents, estimated_mean

from .ours import FULL, TUNED

PEERS_FULL = "full cache, peers' environment"
BEGIN, END = "<!-- leaderboard: begin -->", "<!-- leaderboard: end -->"
HEADINGS = (
    "cache",
    "bytes at 1024 tokens",
    "perplexity",
    "above the full cache",
    "far tokens, nats",
    "agreement of 64",
    "prompt",
    "step",
)


def figures(
    results: Sequence[dict[str, Any]], documents: Sequence[str], far: Sequence[Sequence[bool]]
) -> list[dict[str, Any]]:
    """What the result file says of each cache.

    Parameters
    ----------
    results
        As `continuing.measure` makes them, with names and shares; the full cache among them.
    documents
        Of each window.
    far
        Of each window's continuation, which tokens need far context.
    """
    full = next(result for result in results if result["name"] == FULL)
    theirs = next((result for result in results if result["name"] == PEERS_FULL), full)
    rows = []
    for result in results:
        losses = np.array(result["losses"])
        counts = [losses.shape[1]] * len(losses)
        mean = estimated_mean(documents, losses.sum(1).tolist(), counts)
        chosen = [own[np.array(which)] for own, which in zip(losses, far, strict=True)]
        far_nats = estimated_mean(
            documents, [float(own.sum()) for own in chosen], [len(own) for own in chosen]
        )
        agreed = [
            _prefix(wanted, found)
            for wanted, found in zip(full["greedy"], result["greedy"], strict=True)
        ]
        beside = theirs if "versions" in result else full
        rows.append(
            {
                "name": result["name"],
                "share": result["share"],
                "bytes": result["bytes"],
                "grows": result["grows"],
                "perplexity": {key: math.exp(value) for key, value in asdict(mean).items()},
                "above_full": asdict(_above(documents, np.array(full["losses"]), losses)),
                "far_nats": asdict(far_nats),
                "agreement": asdict(estimated_mean(documents, agreed, [1] * len(agreed))),
                "prompt_seconds": result["prompt_seconds"],
                "step_seconds": result["step_seconds"],
                "prompt_of_full": result["prompt_seconds"] / beside["prompt_seconds"],
                "step_of_full": result["step_seconds"] / beside["step_seconds"],
            }
        )
    return rows


def _prefix(wanted: Sequence[int], found: Sequence[int]) -> int:
    """How many of the first tokens agree."""
    for place, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a != b:
            return place
    return len(wanted)


def _above(documents: Sequence[str], full: np.ndarray, own: np.ndarray) -> Estimate:
    """Perplexity above the full cache's: the same documents drawn for both."""
    names = sorted(set(documents))
    table = np.zeros((len(names), 3))
    for document, a, b in zip(documents, full, own, strict=True):
        table[names.index(document)] += (a.sum(), b.sum(), len(a))
    drawn = np.concatenate([np.ones((1, len(names))), drawn_documents(len(names))]) @ table
    above = np.exp(drawn[:, 1] / drawn[:, 2]) - np.exp(drawn[:, 0] / drawn[:, 2])
    low, high = np.quantile(above[1:], [0.025, 0.975]) if len(names) > 1 else (math.nan,) * 2
    return Estimate(float(above[0]), float(low), float(high))


def text(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The page's part that a machine writes: a table a budget, best first, and what made it."""
    parts = []
    for share in facts["budgets"]:
        own = [row for row in rows if row["share"] == share]
        parts += [
            f"### {share} % of the bytes: {facts['budgets'][share]:,}",
            "",
            *_table(own),
            "",
        ]
    whole = [row for row in rows if not row["share"]]
    parts += ["### Every pair kept", "", *_table(whole), ""]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    theirs = ", ".join(f"{name} {number}" for name, number in facts["peers_versions"].items())
    parts.append(
        f"{facts['windows']} windows of {facts['documents']} modules; "
        f"{facts['far_tokens']} far tokens. "
        f"Made by `{facts['command']}` on {facts['date']}: {versions}. Peers: {theirs}. "
        f"One thread of {facts['machine']['cpu']}, float32, {facts['batch']} windows at a time."
    )
    if facts["missing"]:
        parts += ["", f"**Not measured yet**, by share: {'; '.join(facts['missing'])}."]
    return "\n".join(parts)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in sorted(rows, key=lambda row: row["perplexity"]["value"]):
        name = f"**{row['name']}**" if row["name"].startswith("less_cache") else row["name"]
        full = row["name"] == FULL
        lines.append(
            (
                name,
                f"{row['bytes']:,}" + (", grows" if row["grows"] else ""),
                f"{row['perplexity']['value']:.2f}",
                "" if full else _estimate(row["above_full"], 2),
                _estimate(row["far_nats"], 2),
                "" if full else _estimate(row["agreement"], 1),
                f"{row['prompt_of_full']:.1f} ×",
                f"{row['step_of_full']:.1f} ×",
            )
        )
    table = for_a_page(HEADINGS, lines)
    # Names are read from the left.
    return [table[0], table[1].replace("| ---: |", "| --- |", 1), *table[2:]]


def _estimate(found: dict[str, float], digits: int) -> str:
    value = f"{found['value']:.{digits}f}"
    if math.isnan(found["low"]):
        return value
    return f"{value} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def between(page: str, part: str) -> str:
    """The page with what lies between its two marks replaced."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"page: lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity, and nats of far tokens, against bytes at the windows' end: a dot a cache."""
    from matplotlib.figure import Figure

    kinds = (
        ("less_cache, tuned", "#2f7d6b", "o", lambda n: n == TUNED),
        ("less_cache, other caches", "#7fb8a8", "s", lambda n: n.startswith("less_cache")),
        ("kvpress, compressing as it decodes", "#c4572e", "^", lambda n: "decoding" in n),
        ("kvpress over QuantizedCache", "#8a5fbf", "P", lambda n: "over Quantized" in n),
        ("kvpress, once after the prompt", "#e0a458", "v", lambda n: n.startswith("kvpress")),
        ("QuantizedCache", "#4a6fa5", "D", lambda n: n.startswith("Quantized")),
        ("full cache", "#1d2228", "*", lambda n: n == FULL),
    )
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    told = (("perplexity", "perplexity of the continuation"), ("far_nats", "nats a far token"))
    for axes, (key, label) in zip(panels, told, strict=True):
        left = list(rows)
        for name, colour, marker, is_one in kinds:
            own = [row for row in left if is_one(row["name"])]
            left = [row for row in left if not is_one(row["name"])]
            own.sort(key=lambda row: row["bytes"])
            if not own:
                continue
            x, y = [row["bytes"] for row in own], [row[key]["value"] for row in own]
            ours = name == "less_cache, tuned"
            axes.plot(
                x,
                y,
                ls="-" if ours else "",
                marker=marker,
                color=colour,
                ms=9 if ours or name == "full cache" else 5.5,
                lw=2,
                zorder=3 if ours else 2,
                alpha=1 if ours else 0.85,
                label=name,
            )
        axes.set_xscale("log")
        ticks = [row["bytes"] for row in rows if row["name"] in (TUNED, FULL)]
        axes.set_xticks(ticks, [f"{tick / 1000:,.0f} kB" for tick in ticks])
        axes.xaxis.set_minor_formatter(lambda *_: "")
        axes.set_xlabel("bytes a sequence at 1024 tokens")
        axes.set_ylabel(label)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_yscale("log")
    for formatter in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:.0f}")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)
