"""Timing, memory and a description of where it was measured."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from less_cache.evaluation import surroundings as evaluation

WARM_UP = 2
"""Untimed calls of each contestant: allocations, thread pools, compilation."""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    before: Mapping[str, Callable[[], None]] | None = None,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times each, in turn: a noisy neighbour then hits them all.

    Parameters
    ----------
    calls
        By name, what to time.
    repeats
        How often.
    before
        By name, what to do before each call, untimed.
    warm_up
        Untimed rounds before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warm_up, repeats):
        for name, call in calls.items():
            if before:
                before[name]()
            started = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(seconds: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, median, high = statistics.quantiles([s * 1e3 for s in seconds], n=4, method="inclusive")
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def free_bytes() -> int:
    """Memory that new allocations may take."""
    return int(psutil.virtual_memory().available)


def surroundings() -> dict[str, Any]:
    """Machine, versions, date and command line, for the head of a result file."""
    around = evaluation.surroundings()
    around["machine"] |= {
        "cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": round(psutil.getloadavg()[0], 2),
    }
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {**around, "command": command}
