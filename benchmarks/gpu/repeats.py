"""One step many times from the same state: equal bits each time.

A race in global memory, which compute-sanitizer does not look for, would show as a difference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import less_cache as lc

from .scenes import POLICIES, copied, filled_arrays, layer_of, tokens_for, write

CAPACITIES = (16, 100, 205, 819)


def repeated(
    policy: lc.Policy,
    capacity: int,
    times: int,
    device: Any,
    *,
    batch: int = 16,
    heads: tuple[int, int, int] = (32, 8, 128),
    dtype: str = "float16",
    hidden: int = 512,
) -> dict[str, Any]:
    """How many of `times` steps differed from the first, in any bit of output or arrays."""
    layer, maps = layer_of(*heads, capacity, policy=policy, dtype=dtype, hidden=hidden)
    generator = torch.Generator(device).manual_seed(capacity)
    before, lengths = filled_arrays(layer, batch, device, generator)
    tokens = tokens_for(layer, batch, 1, device, generator)
    plan = lc.plan_step(layer, maps, device=device, backend="triton")

    def step() -> dict[str, torch.Tensor]:
        arrays = copied(before)
        out = lc.step(plan, arrays, *tokens, lengths=lengths)
        return {"out": out, **arrays.named()}

    expected, differing = step(), set()
    unequal = 0
    for _ in range(times):
        found = step()
        names = [n for n, x in expected.items() if not same_bits(x, found[n])]
        unequal += bool(names)
        differing.update(names)
    return {
        "policy": type(policy).__name__,
        "C": capacity,
        "steps": times,
        "unequal": unequal,
        "in": ", ".join(sorted(differing)),
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to itself."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def main(
    times: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 500,
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Fail if any step differs."""
    rows = [
        repeated(policy, capacity, times, torch.device("cuda"))
        for policy in POLICIES
        for capacity in CAPACITIES
    ]
    write(json_file, rows)
    unequal = sum(row["unequal"] for row in rows)
    print(f"{unequal} steps differ")
    sys.exit(int(unequal > 0))


if __name__ == "__main__":
    typer.run(main)
