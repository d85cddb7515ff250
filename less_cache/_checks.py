"""Checks of what a user hands in: an error names the argument, what was given, what is allowed."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


def check_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """`value` as an int.

    Raises
    ------
    TypeError
        If it is no integer (a bool is none).
    ValueError
        If it lies outside ``minimum .. maximum``.
    """
    allowed = (
        f"an integer >= {minimum}" if maximum is None else f"an integer {minimum} to {maximum}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {allowed}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name}: got {number}, expected {allowed}")
    return number


def check_real(name: str, value: Any, *, above: float, maximum: float = math.inf) -> float:
    """`value` as a float.

    Raises
    ------
    TypeError
        If it is no real number (a bool is none).
    ValueError
        If it is not finite, or lies outside ``above < value <= maximum``.
    """
    allowed = f"a number > {above:g}"
    if maximum != math.inf:
        allowed += f" and <= {maximum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {allowed}")
    number = float(value)
    if not (math.isfinite(number) and above < number <= maximum):
        raise ValueError(f"{name}: got {value}, expected {allowed}")
    return number


def check_choice(name: str, value: Any, allowed: Any) -> Any:
    """`value` if it is one of `allowed`.

    Raises
    ------
    ValueError
        If it is not.
    """
    # Whatever else it is, it may not even be comparable.
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def check_memory(name: str, given: Any, needed: float, device: torch.device) -> None:
    """Refuse what takes more bytes than a device has at all.

    Parameters
    ----------
    name, given
        The argument that asks for so much, and its value.
    needed
        Bytes.
    device
        Where.

    Raises
    ------
    ValueError
        If the device has less memory.
    """
    has = math.inf
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        # Where the system does not say, what is asked for is tried.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            has = float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    if needed > has:
        raise ValueError(
            f"{name}: got {given}, which takes {needed / 1e9:,.0f} GB of memory; "
            f"{device} has {has / 1e9:,.0f} GB"
        )


def check_dense(name: str, array: Any) -> None:
    """Refuse tensors and arrays whose numbers do not simply lie in memory; others pass.

    Raises
    ------
    TypeError
        If a tensor is sparse, nested, quantised or in oneDNN's layout, or an array is NumPy's
        masked one or a matrix.
    """
    if isinstance(array, torch.Tensor):
        # Every step of every layer comes by here: the text is made for what is refused alone.
        if array.layout is not torch.strided or array.is_nested or array.is_quantized:
            kind = str(array.layout).removeprefix("torch.").removeprefix("_")
            kind = "nested" if array.is_nested else "quantised" if array.is_quantized else kind
            raise TypeError(f"{name}: got a {kind} tensor, expected a dense one")
    elif isinstance(array, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{name}: got a {type(array).__name__}, expected a plain array")


def check_rows(name: str, rows: Any, batch_size: int) -> np.ndarray:
    """`rows` as an array [N] of row numbers, N at least 1.

    Raises
    ------
    TypeError
        If it holds something else than integers.
    ValueError
        If it is not one-dimensional, empty, or a number lies outside ``0 .. batch_size - 1``.
    """
    check_dense(name, rows)
    if isinstance(rows, torch.Tensor):
        if rows.device.type == "meta":
            raise ValueError(f"{name}: on device meta, which holds no numbers")
        if rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"{name}: got dtype {rows.dtype}, expected integers")
        rows = rows.detach().cpu().numpy()
    try:
        given = np.asarray(rows)
    except ValueError:
        raise TypeError(f"{name}: got {rows!r:.80}, expected integers") from None
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"{name}: got dtype {given.dtype}, expected integers")
    if given.ndim != 1 or given.size == 0:
        raise ValueError(f"{name}: got shape {given.shape}, expected one dimension, not empty")
    if given.min() < 0 or given.max() >= batch_size:
        raise ValueError(
            f"{name}: got rows {given.min()} to {given.max()}, expected 0 to {batch_size - 1}"
        )
    return given


def check_path(name: str, path: Any) -> Path:
    """`path` as one.

    Raises
    ------
    TypeError
        If it is neither a text nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}: got {type(path).__name__}, expected a text or a pathlib.Path")
    return Path(path)


def check_device(name: str, device: Any) -> torch.device:
    """`device` as a torch device of this machine.

    Raises
    ------
    TypeError
        If it is neither a text, an index nor a `torch.device`.
    ValueError
        If torch knows no such device, or the machine has none of that index.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(
            f"{name}: got {device!r} of type {type(device).__name__}, "
            "expected a device such as 'cpu' or 'cuda:0'"
        )
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{name}: got {device!r}, expected a device such as 'cpu' or 'cuda:0'"
        ) from None
    if found.type == "cpu" and found.index:
        raise ValueError(f"{name}: got {device!r}, but there is one CPU: 'cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name}: got {device!r}, but torch finds {torch.cuda.device_count()} CUDA GPU(s) here"
        )
    if found.type not in ("cpu", "cuda", "meta"):
        try:
            torch.empty(1, device=found)
        except Exception as error:  # Devices of other vendors miss modules, drivers, kernels.
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{name}: got {device!r}, which does not work here: {reason}"
            ) from None
    return found
