"""The first half hour on a card, as one command: all parts in order, whatever becomes of each.

::

    make gpu                            # or: python -m benchmarks.gpu
    python -m benchmarks.gpu --only kernels --only prompt

Each part is a process of its own, so that a kernel that breaks its CUDA context breaks no other.
Results, versions and what went wrong go into one JSON file and one page beside it, both written
anew after each part.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .page import page_of
from .parts import PARTS, card_name, environment, run_part

RESULTS = Path(__file__).parents[1] / "results"


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(part.name for part in PARTS)}.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON file and the page.")] = RESULTS,
) -> None:
    """Run the parts; exit with 1 if one failed, with 2 if none could run."""
    unknown = sorted(set(only or []) - {part.name for part in PARTS})
    if unknown:
        raise typer.BadParameter(f"only: got {unknown}, expected {[part.name for part in PARTS]}")
    chosen = [part for part in PARTS if not only or part.name in only]
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"gpu_{card_name().replace(' ', '_')}"
    report = {
        "card": card_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "parts": [],
    }
    for part in chosen:
        print(f"{part.name}: {part.title}", flush=True)
        found = run_part(part)
        report["parts"].append(found)
        reason = f": {found['reason']}" if found["reason"] else ""
        print(f"  {found['outcome']} after {found['seconds']:.0f} s{reason}", flush=True)
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".md").write_text(page_of(report))
    print(f"{stem}.json, {stem}.md")
    outcomes = {found["outcome"] for found in report["parts"]}
    if "failed" in outcomes:
        sys.exit(1)
    sys.exit(0 if "passed" in outcomes else 2)


if __name__ == "__main__":
    typer.run(main)
