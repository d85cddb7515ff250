"""The rule that all attacks go by: a clear error and nothing changed, or the right result.

A clear error is one that our own code raises on purpose, of a kind that users expect, and it names
the argument (or the file, or the field) that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from less_cache.cli.telling import is_told

CLEAR = (ValueError, TypeError, OSError)


@dataclass(frozen=True)
class Refusal:
    """What a call was refused with."""

    error: BaseException


def outcome(
    call: Callable[[], Any], *names: str, unchanged: Callable[[], Any] = lambda: None
) -> Any:
    """What a call returns, or its `Refusal`, once that has been found to keep to the rule.

    Parameters
    ----------
    call
        The attack.
    names
        The error has to begin with one of these, as a whole word; without: with anything.
    unchanged
        Takes a picture of what a call that fails must leave alone.
    """
    before = unchanged()
    try:
        return call()
    except Exception as raised:
        error = raised
    check_error(error, *names)
    assert unchanged() == before, f"refused ({error}), but something has changed"
    return Refusal(error)


def check_error(error: BaseException, *names: str) -> None:
    """Fail unless the error is a clear one that begins with one of `names`."""
    told = f"{type(error).__name__}: {str(error)[:300]}"
    assert isinstance(error, CLEAR), f"not a clear error: {told}"
    assert is_told(error), f"nobody raised it on purpose: {told}"
    if isinstance(error, OSError) and error.filename is not None:
        return
    begins = rf"(?:{'|'.join(map(re.escape, names))})(?!\w)"
    assert not names or re.match(begins, str(error)), f"names none of {names}: {told}"


def refused(call: Callable[[], Any], *names: str, unchanged: Callable[[], Any] = lambda: None):
    """Fail unless the call is refused by the rule."""
    found = outcome(call, *names, unchanged=unchanged)
    assert isinstance(found, Refusal), f"taken, expected an error about {' or '.join(names)}"


def bits(arrays: Any) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of each of some arrays by name."""
    return {name: (str(x.dtype), tuple(x.shape), _bytes(x)) for name, x in arrays.items()}


def _bytes(array: Any) -> bytes:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()


def state_bits(state: Any) -> list[Any]:
    """All of a cache's arrays, and the bounds that are counted beside them."""
    return [(bits(layer.arrays()), layer.tokens_bound) for layer in state.layers]


def files_below(folder: Path) -> dict[str, bytes | None]:
    """Each file's bytes by its path, and ``None`` for each folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
