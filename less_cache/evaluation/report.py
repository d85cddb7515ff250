"""A comparison as a table in the terminal, as JSON, and as pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from .._files import json_text, replaced, write_text
from .comparison import FULL, POLICY, Comparison, Row

COLOURS = {"muted": "#8a8f98", "bad": "#c4572e", "plus": "#d9a441", "good": "#2f7d6b"}


def as_table(comparison: Comparison, title: str) -> Table:
    """The comparison for the terminal, of at most 80 columns where names are short."""
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    # Names and ranges of slots may wrap; what is a number may not.
    table.add_column("cache")
    table.add_column("slots", justify="right")
    for column in ("bytes a\nsequence", "perplexity", "second\nhalf", "gap\nrecovered"):
        table.add_column(column, justify="right", no_wrap=True)
    accepted = any(row.accepted is not None for row in comparison.rows)
    if accepted:
        table.add_column("accepted\nprefix", justify="right", no_wrap=True)
    for row in comparison.rows:
        cells = [
            row.name,
            row.slots.replace(", ", "\n"),
            f"{row.bytes_per_sequence:,}",
            f"{row.perplexity:,.2f}",
            f"{row.second_half:,.2f}",
            gap_text(row).replace(" (", "\n("),
        ]
        if accepted:
            cells.append("" if row.accepted is None else f"{row.accepted:.1f}")
        # As text: a name may look like markup.
        table.add_row(*map(Text, cells))
    return table


def gap_text(row: Row) -> str:
    """The recovered share with its interval, as text."""
    if row.name in (FULL, POLICY):
        return ""
    if row.recovery is None:
        return "no gap"
    share = row.recovery
    if math.isnan(share.low):
        return f"{share.share:.0%} (one document)"
    return f"{share.share:.0%} ({share.low:.0%} to {share.high:.0%})"


def check_can_draw() -> None:
    """Refuse to begin what would end in pictures that cannot be drawn.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("report: needs matplotlib: install less_cache[train]")


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-ready data."""
    return {
        **comparison.facts,
        "caches": [dataclasses.asdict(row) for row in comparison.rows],
    }


def save_report(comparison: Comparison, folder: Path, title: str) -> list[Path]:
    """Write the comparison as JSON and as two pictures into a folder; the files' paths."""
    written = [folder / "comparison.json"]
    write_text(written[0], json_text(as_json(comparison), indent=2) + "\n")
    for name, draw in (("positions", draw_positions), ("recovery", draw_recovery)):
        written.append(folder / f"{name}.png")
        with replaced(written[-1]) as temporary:
            draw(comparison, title).savefig(temporary, format="png", dpi=130)
    return written


def _colour(name: str) -> str:
    if name == FULL:
        return COLOURS["muted"]
    if name == POLICY:
        return COLOURS["bad"]
    return COLOURS["good"] if name.startswith("LESS") else COLOURS["plus"]


def draw_positions(comparison: Comparison, title: str) -> Any:
    """Loss by position: where in a text a small cache hurts, and where LESS helps."""
    figure, axes = blank_figure(title)
    full = comparison.row(FULL)
    dashes = iter(("-", "--", ":", "-."))
    for row in comparison.rows:
        if row.name == FULL:
            continue
        extra = [a - b for a, b in zip(row.losses, full.losses, strict=True)]
        style = next(dashes) if row.name.startswith("LESS") else "-"
        axes.plot(row.positions, extra, style, color=_colour(row.name), label=row.name, lw=2)
    axes.axhline(0, color=COLOURS["muted"], lw=1)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss above the full cache (nats a token)")
    axes.set_xlim(0, None)
    axes.legend(frameon=False)
    return figure


def draw_recovery(comparison: Comparison, title: str) -> Any:
    """The share of the gap that each cache wins back, with its interval."""
    figure, axes = blank_figure(title)
    rows = [row for row in comparison.rows if row.recovery is not None]
    for place, row in enumerate(rows):
        share = row.recovery
        if share is None:
            continue
        axes.barh(place, share.share, color=_colour(row.name), height=0.6)
        axes.plot([share.low, share.high], [place, place], color="black", lw=1.5)
        axes.text(
            np.nanmax([share.high, share.share, 0]) + 0.01, place, f"{share.share:.0%}", va="center"
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.axvline(0, color=COLOURS["muted"], lw=1)
    axes.set_xlabel("share of the perplexity gap recovered (line: 95 % interval over documents)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.margins(x=0.15)
    return figure


def blank_figure(title: str) -> tuple[Any, Any]:
    """A figure and its axes, in the reports' style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
