"""Steps and prompts in real models' shapes, in 16 bits, against the torch backend in float32."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import less_cache as lc
from less_cache.arrays import LayerArrays

from .scenes import copied, filled_arrays, layer_of, tokens_for, write

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"heads": (32, 32, 128), "capacity": 205},
    "llama-3-8b": {"heads": (32, 8, 128), "capacity": 819},
    "llama-3-8b, one sequence": {"heads": (32, 8, 128), "capacity": 8192, "batch": 1},
    "falcon-7b": {"heads": (71, 1, 64), "capacity": 205},
    "gemma-2-9b": {"heads": (16, 8, 256), "capacity": 205, "softcap": 50.0},
    "phi-3-mini": {"heads": (32, 32, 96), "capacity": 100},
}
BOUNDS = {"float16": 1e-2, "bfloat16": 8e-2}
"""Of the largest difference of an output, over the largest output."""


def compared(
    name: str,
    heads: tuple[int, int, int],
    capacity: int,
    dtype: str,
    device: Any,
    *,
    batch: int = 16,
    prompt: int = 300,
    softcap: float | None = None,
    hidden: int = 512,
) -> dict[str, Any]:
    """The largest differences of a step's output and of a prompt's, relative to the largest output.

    The policy evicts by position, so that rounding decides nothing.
    """
    policy = lc.SinkWindow(sinks=4)
    layer, maps = layer_of(
        *heads, capacity, policy=policy, dtype=dtype, softcap=softcap, hidden=hidden
    )
    wide = dataclasses.replace(layer, dtype="float32")
    generator = torch.Generator(device).manual_seed(0)
    arrays, lengths = filled_arrays(layer, batch, device, generator)
    # What `SinkWindow` would have there.
    arrays.scores.copy_(arrays.positions)
    own = lc.plan_step(layer, maps, device=device, backend="triton")
    other = lc.plan_step(wide, maps, device=device, backend="torch")
    row: dict[str, Any] = {"shape": name, "dtype": dtype, "B": batch, "C": capacity}
    for call, tokens in (("step", 1), ("prompt", prompt)):
        given = tokens_for(layer, batch, tokens, device, generator)
        held = copied(arrays)
        copy = copied(arrays)
        copy = LayerArrays(**{name: widened(x) for name, x in copy.named().items()})
        found = lc.step(own, held, *given, lengths=lengths).float()
        expected = lc.step(other, copy, *(x.float() for x in given), lengths=lengths)
        row[f"{call}, output"] = relative(found, expected)
        row[f"{call}, H"] = relative(held.H, copy.H)
        row[f"{call}, other pairs"] = int((held.positions != copy.positions).sum())
    return row


def widened(array: torch.Tensor) -> torch.Tensor:
    """16 bits as 32, others as they are."""
    return array.float() if array.dtype in (torch.float16, torch.bfloat16) else array


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row is beyond its bounds, or not a number."""
    bound = BOUNDS[row["dtype"]]
    close = all(
        row[f"{call}, {what}"] <= bound for call in ("step", "prompt") for what in ("output", "H")
    )
    return not close or bool(row["step, other pairs"] + row["prompt, other pairs"])


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Fail if any shape is beyond its bounds."""
    rows = []
    for name, shape in SHAPES.items():
        for dtype in BOUNDS:
            rows.append(compared(name, dtype=dtype, device=torch.device("cuda"), **shape))
            rows[-1]["wrong"] = wrong(rows[-1])
    write(json_file, rows)
    failed = sum(row["wrong"] for row in rows)
    print(f"{failed} of {len(rows)} are beyond their bounds")
    sys.exit(int(failed > 0))


if __name__ == "__main__":
    typer.run(main)
