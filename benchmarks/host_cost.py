"""What a step costs before any arithmetic: checks, plans and calls of 32 layers.

::

    python benchmarks/host_cost.py
    python benchmarks/host_cost.py --kernels    # with all that Triton's backend does to launch

A backend that does nothing stands in for a GPU's, whose kernels are launched and not waited for.
What remains is the time in which a GPU would have to wait for Python. With ``--kernels`` the
backend ``triton`` compiles its kernels, finds them and calls a launcher that does nothing: CUDA's
own part of a launch is missing, and tensors are made by the CPU's allocator.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import less_cache as lc
from benchmarks.measuring import surroundings
from less_cache.backends import Entry, register_backend

RESULTS = Path(__file__).parent / "results"
STAND_IN = "host_cost_stand_in"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def register_stand_in() -> None:
    """A backend that returns its queries."""
    module: Any = types.ModuleType(STAND_IN)
    module.check_config = lambda config: None
    module.prepare_maps = lambda maps, layer, device: None
    module.attend = lambda layer, arrays, maps, q, k, v, **_: q
    sys.modules[STAND_IN] = module
    register_backend(STAND_IN, Entry(STAND_IN, ("cpu",)))


def step_times(
    layers: int, dtype: torch.dtype, rank: int, repeats: int, backend: str = STAND_IN
) -> list[float]:
    """Milliseconds of steps of all layers, two sequences."""
    config = lc.CacheConfig(layers, 32, 8, 128, capacity=64, policy=lc.H2O(), rank=rank)
    maps = lc.FeatureMaps.initialise(config, hidden=16) if rank else None
    manager = lc.CacheManager(config, maps, backend=backend)
    state = manager.init(2, dtype=dtype)
    q = torch.zeros(2, 32, 1, 128, dtype=dtype)
    k = torch.zeros(2, 8, 1, 128, dtype=dtype)
    found = []
    for turn in range(-10, repeats):
        started = time.perf_counter()
        for layer in range(layers):
            manager.attend(state, layer, q, k, k)
        if turn >= 0:
            found.append((time.perf_counter() - started) * 1e3)
    return found


def main(
    layers: Annotated[int, typer.Option(min=1, help="Calls a step.")] = 32,
    repeats: Annotated[int, typer.Option(min=2, help="Timed steps of each dtype.")] = 200,
    kernels: Annotated[bool, typer.Option(help="Triton's launches, too.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Measure what a step costs on the host."""
    backend = STAND_IN
    if kernels:
        # It needs Triton, which the rest does not.
        from benchmarks.triton_stand_in import use_stand_in

        use_stand_in()
        backend = "triton"
    else:
        register_stand_in()
    if json_file is None:
        json_file = RESULTS / ("host_cost_kernels.json" if kernels else "host_cost.json")
    around = surroundings()
    rows = []
    shown = Table(title=f"A step of {layers} layers on the host")
    for heading in ("dtype", "rank", "least ms", "median ms"):
        shown.add_column(heading, justify="right")
    for dtype in DTYPES[1:2] if kernels else DTYPES:
        for rank in (0, 8):
            found = step_times(layers, dtype, rank, repeats, backend)
            name = str(dtype).removeprefix("torch.")
            least, median = min(found), statistics.median(found)
            rows.append({"dtype": name, "rank": rank, "least_ms": least, "median_ms": median})
            shown.add_row(name, str(rank), f"{least:.2f}", f"{median:.2f}")
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(
        json.dumps(
            {"settings": {"layers": layers, "backend": backend}, **around, "results": rows},
            indent=1,
        )
        + "\n"
    )
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
