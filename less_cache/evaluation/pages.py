"""What all reports' pages have in common: the frame, tables, pictures, and how it was made."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

FRAME = Path(__file__).parent / "frame.html"
LABELS = {"cpu": "processor", "cores": "cores", "system": "system", "threads": "torch threads"}


def page(template: Path, **fields: Any) -> str:
    """A whole page: a template's text with its fields filled in, inside the frame.

    Parameters
    ----------
    template
        A file of what the frame lacks: ``<title>``, ``<style>`` of its own, ``<main>``.
    fields
        The template's, as HTML.
    """
    inside = Template(template.read_text(encoding="utf-8")).substitute(fields)
    return Template(FRAME.read_text(encoding="utf-8")).substitute(page=inside.rstrip("\n"))


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], taken: int | None = None) -> str:
    """A table of plain text that scrolls where it is wide; row `taken` stands out."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "\n".join(row(cells, taken=place == taken) for place, cells in enumerate(rows))
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'


def row(texts: Iterable[Any], *, taken: bool = False) -> str:
    """A row of plain text."""
    kind = ' class="taken"' if taken else ""
    return f"<tr{kind}>{cells(html.escape(str(text)) for text in texts)}</tr>"


def cells(contents: Iterable[str]) -> str:
    """The cells of a row, whose contents are HTML already."""
    return "".join(f"<td>{content}</td>" for content in contents)


def around_rows(facts: Mapping[str, Any]) -> str:
    """The rows that tell how it was made, from what `surroundings` gives."""
    told = {"command": facts["command"], "date": facts["date"]}
    told |= {label: facts["machine"][name] for name, label in LABELS.items()}
    told |= facts["versions"]
    return "\n".join(map(row, told.items()))


def as_png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def inline(png: bytes) -> str:
    """The address of an image that lies in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
