"""Timing, memory and a description of where it was measured."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import less_cache as lc

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
    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": psutil.cpu_count(logical=False),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "load_before": round(psutil.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "less_cache": lc.__version__,
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
