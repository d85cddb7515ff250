"""What a run's logs look like: validation by step, as a picture beside them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import replaced

PICTURE = "curve.png"

logger = logging.getLogger(__name__)


def save_curves(out: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], label: str) -> None:
    """Write ``curve.png`` into a run's folder; where matplotlib is missing, only say so.

    Parameters
    ----------
    out
        The run's folder.
    curves
        By name, the entries of a log, each with ``"step"`` and ``"validation"``.
    label
        What is validated, for the axis.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: matplotlib is missing; the numbers are in log.jsonl", PICTURE)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, entries in curves.items():
        points = [(e["step"], e["validation"]) for e in entries if e.get("validation") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replaced(out / PICTURE) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
