"""``less-cache demo``: the main job on the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .options import check_out
from .telling import say

if TYPE_CHECKING:
    from ..evaluation.demo import Demo


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Run the main job on the shipped model, and write a report to look at."""
    check_out(out)
    from ..evaluation.demo import run_demo
    from ..evaluation.demo_page import write_demo
    from ..evaluation.report import check_can_draw

    check_can_draw()
    result = run_demo()
    page = write_demo(result, out)
    Console().print(demo_table(result))
    say(f"Report: {page}")
    say("Next: less-cache tune --help (your model, text and bytes), less-cache eval --help")


def demo_table(result: Demo) -> Table:
    """A line a cache, in at most 80 columns."""
    from ..evaluation.demo_page import percent

    facts = result.facts
    table = Table(
        title=Text(
            f"Held-out modules: {facts['windows']} windows of {facts['window']:,} tokens; "
            f"{facts['prompts']} prompts; speed at {facts['speed_context']:,} tokens, "
            f"batch {facts['speed_batch']}"
        ),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("cache")
    same = f"same greedy\ntokens of {facts['new_tokens']}"
    for column in ("bytes a\nsequence", "share", "perplexity", same, "tokens a\nsecond"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in result.lines:
        interval = f"{line.mean_accepted:.1f}\n({line.low:.1f} to {line.high:.1f})"
        cells = (
            line.name,
            f"{line.nbytes:,}",
            percent(line.share),
            f"{line.perplexity:,.2f}",
            f"{line.mean_accepted:.0f}" if line is result.lines[0] else interval,
            f"{line.speed.tokens_per_second:,.0f}",
        )
        table.add_row(*map(Text, cells))
    return table
