"""A prompt's attention and sums of its probabilities, against flash attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch.nn import functional as F

import less_cache as lc
from benchmarks.gpu_decode import seconds
from less_cache.arrays import empty_arrays
from less_cache.backends import triton as backend
from less_cache.backends.triton.launch import Launch, recording

from .kernels import SHAPES, launched
from .scenes import layer_of, tokens_for, write


def small_tiles(one: Launch, tokens: int) -> Launch:
    """`attend_chunk` with half the queries and warps a program: two share a multiprocessor."""
    constants = {**one.constants, "BLOCK_M": 64}
    grid = (one.grid[0], triton.cdiv(tokens, 64))
    return dataclasses.replace(one, grid=grid, constants=constants, warps=4)


def measured(shape: str, tokens: int, device: Any) -> dict[str, Any]:
    """Milliseconds of one layer: each kernel, the whole call, and torch's causal attention."""
    layer, maps = layer_of(*SHAPES[shape], capacity=round(0.05 * tokens))
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = tokens_for(layer, 1, tokens, device, generator)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    prepared = None if maps is None else backend.prepare_maps(maps, layer, device)
    with recording() as launches:
        backend.attend(
            layer, empty_arrays(layer, 1, device=device), prepared, q, k, v, lengths=lengths
        )
    row: dict[str, Any] = {"shape": shape, "tokens": tokens}
    for one in launches:
        row[f"{one.kernel.__name__}, ms"] = 1e3 * seconds(lambda one=one: launched(one, device))
        if one.kernel.__name__ == "attend_chunk":
            small = small_tiles(one, tokens)
            row["attend_chunk of 64 queries, ms"] = 1e3 * seconds(
                lambda small=small: launched(small, device)
            )
    plan = lc.plan_step(layer, maps, device=device, backend="triton")
    arrays = empty_arrays(layer, 1, device=device)
    row["whole call, ms"] = 1e3 * seconds(lambda: lc.step(plan, arrays, q, k, v, lengths=lengths))
    grouped = layer.group > 1
    flash = seconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    )
    row["flash, ms"] = 1e3 * flash
    products = 2 * layer.query_heads * layer.head_dim * tokens**2
    row["flash, TFLOP/s"] = products / flash / 1e12
    row["attend_chunk, TFLOP/s"] = products / row["attend_chunk, ms"] / 1e9
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Measure prompts of 4096 tokens, one sequence."""
    write(json_file, [measured(shape, 4096, torch.device("cuda")) for shape in SHAPES])


if __name__ == "__main__":
    typer.run(main)
