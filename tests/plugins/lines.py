"""Layers and records of kernels as lines of fields, which the C++ tests read."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest

from less_cache.layer_config import LayerConfig
from less_cache.quantization import TRANSFORMS, Quantization
from less_cache.quantization.settings import spelled_bits
from tests.plugins.built import built

pytest.importorskip("triton")

from less_cache.backends.triton.aot.records import ANY, Record
from less_cache.backends.triton.plans import KINDS

RECORD_FIELDS = tuple(f.name for f in fields(Record) if f.name not in ("offset", "size"))


def record_line(record: dict[str, Any]) -> str:
    """A line that adds a kernel to a table."""
    values = [record[name] for name in RECORD_FIELDS]
    return line("record", *(int(x) if isinstance(x, bool) else x for x in values))


def layer_fields(layer: LayerConfig, kind: str | None, hidden: int) -> tuple[Any, ...]:
    """Sizes and attributes in the order of `Sizes` and `Attributes`."""
    policy, codes = layer.policy, layer.quantization
    key, value = layer.key_layout, layer.value_layout
    return (
        *(layer.query_heads, layer.kv_heads, layer.head_dim, hidden if layer.rank else 0),
        *(layer.dtype, layer.state_dtype),
        *(0 if layout is None else layout.nbytes for layout in (key, value)),
        *(int(policy.starts), int(policy.gains), policy.sinks, policy.protected_recent),
        *(policy.decay, policy.history_window, layer.capacity, layer.rank),
        *(KINDS[kind] if layer.rank and kind else 0, layer.scale, layer.softcap or 0.0),
        *(spelled_bits(bits) for bits in bits_of(codes)),
        ANY if codes is None else TRANSFORMS.index(codes.transform),
    )


def bits_of(codes: Quantization | None) -> tuple[Any, Any]:
    """Of keys and of values."""
    return (0, 0) if codes is None else (codes.key_bits, codes.value_bits)


def line(*values: Any) -> str:
    """Fields with tabs between them."""
    return "\t".join(map(str, values))


def planned(lines: Sequence[str]) -> list[tuple[list[list[str]], str]]:
    """Of each layer that `plan_dump` is given: its launches as lists of fields, and the last line.

    A launch has its kernel's name and symbol, grid x and y, warps and arguments.
    """
    result = subprocess.run(
        [built("plan_dump")], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    answers, found = [], []
    for text in result.stdout.splitlines():
        values = text.split("\t")
        if values[0] in ("end", "refused"):
            answers.append((found, text))
            found = []
        else:
            found.append(values)
    return answers
