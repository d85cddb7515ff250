"""The decode benchmark's results as a table, as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.table import Table

from benchmarks.tables import for_a_page, for_terminal

mpl.use("Agg")
from matplotlib import pyplot as plt

CACHES = {
    "static": ("StaticCache", "#b04a3a", "s"),
    "dynamic": ("DynamicCache", "#d99a3d", "^"),
    "rank0": ("policy alone (rank 0)", "#8a9199", "D"),
    "less": ("LESS", "#1f5fa8", "o"),
}
"""Label, colour and marker."""
HEADINGS = (
    "batch",
    "context",
    *("static ms", "dynamic ms", "rank 0 ms", "LESS ms"),
    *("LESS tok/s", "faster by", "LESS MB", "full MB"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    ratio = row["ratio_to_best_full"]
    return [
        str(row["batch"]),
        f"{row['context']:,}",
        *(f"{row[name]['median_ms']:.1f}" if name in row else "–" for name in CACHES),
        f"{row['less']['tokens_per_second']:.0f}",
        f"{ratio:.1f}×" if ratio else "–",
        f"{row['less']['bytes'] / 1e6:.0f}",
        f"{row['full_bytes'] / 1e6:,.0f}",
    ]


def table(report: dict[str, Any]) -> Table:
    """For the terminal."""
    rows = map(cells, report["results"])
    return for_terminal("One decode step", HEADINGS, rows, caption=summary(report))


def markdown(report: dict[str, Any]) -> str:
    """For docs/benchmarks.md."""
    lines = [
        *for_a_page(HEADINGS, map(cells, report["results"])),
        "",
        summary(report),
        "",
        where(report),
    ]
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """The headline numbers in a sentence."""
    at, ratio = report["ratio_at"], report["ratio_to_best_full"]
    against = f"{ratio:.1f} times the faster full cache's throughput" if ratio else "no full cache"
    return (
        f"At {at['context']:,} tokens and batch {at['batch']}: {against}, and "
        f"{report['less_over_rank0']:.2f} of a step at rank 0. "
        f"A LESS step at 65,536 tokens takes {report['step_64k_over_1k']:.2f} of one at 1,024."
    )


def where(report: dict[str, Any]) -> str:
    """Machine, versions and date in a sentence."""
    machine, versions = report["machine"], report["versions"]
    return (
        f"Measured {report['date']} on {machine['cores']} cores of an {machine['cpu']} "
        f"({machine['threads']} threads, {machine['memory_gib']} GiB, "
        f"load before: {machine['load_before']}), "
        f"Python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens per second against context, one panel a batch size, and bytes in the last."""
    batches = sorted({row["batch"] for row in report["results"]})
    figure, axes = plt.subplots(
        1, len(batches) + 1, figsize=(4.0 * (len(batches) + 1), 3.9), squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=False):
        rows = [row for row in report["results"] if row["batch"] == batch]
        for name, (label, colour, marker) in CACHES.items():
            points = [(r["context"], r[name]["tokens_per_second"]) for r in rows if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)
        axis.set_title(f"batch {batch}")
        axis.set_ylabel("tokens per second" if batch == batches[0] else "")
        axis.sharey(axes[0][0])
    sizes = axes[0][-1]
    rows = [row for row in report["results"] if row["batch"] == batches[-1]]
    contexts = [row["context"] for row in rows]
    for label, colour, marker, values in (
        ("full cache", CACHES["static"][1], "s", [row["full_bytes"] for row in rows]),
        ("LESS", CACHES["less"][1], "o", [row["less"]["bytes"] for row in rows]),
    ):
        sizes.plot(contexts, [v / 1e6 for v in values], label=label, color=colour, marker=marker)
    sizes.set_title(f"cache size, batch {batches[-1]}")
    sizes.set_ylabel("MB")
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        ticks = sorted({row["context"] for row in report["results"]})
        axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.minorticks_off()
        axis.set_xlabel("context, tokens")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=9)
    sizes.legend(frameon=False, fontsize=9)
    if report["skipped"]:
        figure.text(0.01, 0.01, "Where a point is missing, the cache did not fit.", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
