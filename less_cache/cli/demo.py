"""``less-cache demo``: the main job on the shipped model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import check_out
from .telling import say


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Run the main job on the shipped model, and write a report to look at."""
    check_out(out)
    from ..evaluation.demo import run_demo, write_demo
    from ..evaluation.report import as_table, check_can_draw

    check_can_draw()
    result = run_demo()
    page = write_demo(result, out)
    console = Console()
    console.print(as_table(result.comparison, "Held-out modules of the standard library"))
    table = Table(title=f"Continuing {result.document}", title_justify="left")
    for column in ("cache", "bytes", "tokens/s", "first tokens as under the full cache"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for item in result.continuations:
        table.add_row(
            item.name,
            f"{item.bytes_per_sequence:,}",
            f"{item.tokens_per_second:.0f}",
            str(item.agreed),
        )
    console.print(table)
    say(f"Report: {page}")
    say("Next: less-cache eval --help (your model and text), less-cache train --help")
