"""Rows of text as a table for the terminal, and for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def for_terminal(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None
) -> Table:
    """Rows under headings, numbers to the right."""
    shown = Table(title=title, caption=caption, padding=(0, 0))
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def for_a_page(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of the same in Markdown."""
    lines = [headings, *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return [text[0], "|" + " ---: |" * len(headings), *text[1:]]
