"""What the benchmarks' options have in common."""

from __future__ import annotations

import typer


def numbers(text: str) -> list[int]:
    """``1024,8k`` -> [1024, 8192]."""
    values = []
    for item in text.lower().split(","):
        count = item.strip().removesuffix("k")
        if not count.isdecimal() or int(count) == 0:
            raise typer.BadParameter(f"got {item!r}, expected positive integers such as 1024,8k")
        values.append(int(count) * (1024 if item.strip().endswith("k") else 1))
    return sorted(set(values))
