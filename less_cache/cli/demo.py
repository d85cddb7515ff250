"""``less-cache demo``: the main job on the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .bench import timings_table
from .options import check_out
from .telling import say


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Run the main job on the shipped model, and write a report to look at."""
    check_out(out)
    from ..evaluation.demo import CONTEXT, run_demo
    from ..evaluation.demo_page import write_demo
    from ..evaluation.report import as_table, check_can_draw

    check_can_draw()
    result = run_demo()
    page = write_demo(result, out)
    console = Console()
    console.print(as_table(result.comparison, "Held-out modules, SinkWindow at 5%"))
    console.print(
        timings_table(result.timings, f"One layer's step after {CONTEXT:,} tokens, on this machine")
    )
    say(f"Report: {page}")
    say("Next: less-cache eval --help (your model and text), less-cache train --help")
