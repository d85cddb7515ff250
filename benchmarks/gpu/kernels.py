"""Each kernel of a decode step by itself, many launches in one CUDA graph, and variants of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu_decode import captured, copy_bandwidth, seconds
from less_cache.backends import triton as backend
from less_cache.backends.triton.launch import Launch, launch, recording
from less_cache.layer_config import LayerConfig

from .scenes import filled_arrays, layer_of, tokens_for, write

SHAPES = {"llama-2-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128)}
BATCHES = (1, 16, 64)
CAPACITIES = (205, 819, 8192)
BEYOND_CACHE = 400e6
"""Bytes that launches in a row go through, so that none finds what it wants in the chip's cache."""

MOST_CACHES = 64
MOST_BYTES = 30e9
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "2 stages": {"stages": 2},
    "4 stages": {"stages": 4},
    "8 warps": {"warps": 8},
}
"""Of kernels A and B: what to launch them with in place of what the library does."""


def launches_of(
    layer: LayerConfig, maps: Any, batch: int, device: Any, count: int
) -> list[list[Launch]]:
    """What a step of each of `count` caches launches, in order."""
    generator = torch.Generator(device).manual_seed(0)
    prepared = None if maps is None else backend.prepare_maps(maps, layer, device)
    found = []
    for _ in range(count):
        arrays, lengths = filled_arrays(layer, batch, device, generator)
        tokens = tokens_for(layer, batch, 1, device, generator)
        with recording() as launches:
            backend.attend(layer, arrays, prepared, *tokens, lengths=lengths)
        found.append(list(launches))
    return found


def bytes_of(layer: LayerConfig, batch: int) -> dict[str, int]:
    """Bytes that each kernel has to move, counted as docs/performance.md does."""
    size = getattr(torch, layer.dtype).itemsize
    heads, slots = batch * layer.kv_heads, batch * layer.slots
    state = heads * layer.rank * (layer.head_dim + 1) * 8
    tokens = heads * layer.head_dim * size * (2 + 2 + 2 + 2 * layer.group)
    pairs = slots * (2 * layer.head_dim * size + 4 + 4 * layer.group)
    scores = slots * (8 + 4 * layer.group)
    return {
        "select": slots * 8,
        "map": heads * layer.head_dim * size,
        "select_and_map": slots * 8 + heads * layer.head_dim * size,
        "attend": pairs + scores + state + tokens,
        "conclude_split": scores + state + tokens,
    }


def name_of(one: Launch) -> str:
    """What a launch does, as `bytes_of` has it."""
    name = str(one.kernel.__name__)
    if name != "select_and_map":
        return name
    maps = bool(one.constants["KIND"])
    return name if maps and one.constants["SELECTS"] else "map" if maps else "select"


def launched(one: Launch, device: Any) -> None:
    """Launch what was recorded."""
    launch(
        one.kernel,
        one.grid,
        one.arguments,
        one.constants,
        device=device,
        warps=one.warps,
        stages=one.stages,
        registers=one.registers,
    )


def measured(
    shape: str, batch: int, capacity: int, device: Any, time: Callable[[Any], float]
) -> Iterator[dict[str, Any]]:
    """A row for each kernel and each variant of it that compiles."""
    layer, maps = layer_of(*SHAPES[shape], capacity)
    a_cache = layer.bytes_per_sequence * batch
    count = max(1, min(MOST_CACHES, round(BEYOND_CACHE / a_cache), int(MOST_BYTES / a_cache)))
    steps = launches_of(layer, maps, batch, device, count)
    moved = bytes_of(layer, batch)
    for one in (one for step in steps for one in step):
        # Each kernel finds what those before it leave.
        launched(one, device)
    for place, kernel in enumerate(name_of(one) for one in steps[0]):
        for variant, changes in VARIANTS.items():
            own = [dataclasses.replace(step[place], **changes) for step in steps]
            row = {"shape": shape, "B": batch, "C": capacity, "kernel": kernel, "with": variant}
            row["programs"] = own[0].grid[0] * (*own[0].grid, 1)[1]
            try:
                spent = time(lambda own=own: [launched(one, device) for one in own]) / count
            except Exception as error:
                # A variant too large for the card must not end the rest.
                yield row | {"error": f"{type(error).__name__}: {error}"[:120]}
                continue
            yield row | {"us": spent * 1e6, "GB/s": moved[kernel] / spent / 1e9}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Measure all, and the bandwidth of a copy to compare with."""
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = [{"kernel": "copy", "GB/s": copy_bandwidth() / 1e9}]

    def in_a_graph(call: Callable[[], Any]) -> float:
        return seconds(captured(call).replay)

    for shape in SHAPES:
        for batch in BATCHES:
            for capacity in CAPACITIES:
                try:
                    rows += measured(shape, batch, capacity, device, in_a_graph)
                except torch.cuda.OutOfMemoryError:
                    rows.append({"shape": shape, "B": batch, "C": capacity, "error": "memory"})
                torch.cuda.empty_cache()
                write(json_file, rows)


if __name__ == "__main__":
    typer.run(main)
