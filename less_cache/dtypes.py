"""The dtypes that a cache may have, by their plain names."""

from __future__ import annotations

from typing import Any

from ._checks import check_choice

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each dtype that keys and values may have."""


def dtype_name(dtype: Any, *, argument: str = "dtype") -> str:
    """A dtype's plain name, whatever library it comes from.

    Parameters
    ----------
    dtype
        A name, or a dtype of torch or NumPy.
    argument
        What errors call it.

    Raises
    ------
    ValueError
        If it is none of float64, float32, float16 and bfloat16.
    """
    name = getattr(dtype, "__name__", None) or str(dtype)
    return str(check_choice(argument, name.removeprefix("torch."), DTYPE_BYTES))


def state_dtype_name(dtype: Any) -> str:
    """The plain name of a dtype that H and z may have.

    Raises
    ------
    ValueError
        If it is no dtype, or one of 16 bits.
    """
    name = dtype_name(dtype, argument="state_dtype")
    if DTYPE_BYTES[name] < 4:
        raise ValueError(
            f"state_dtype: got {name!r}, but H and z are running sums of all that is ever evicted: "
            "float16 overflows, and bfloat16 soon takes in nothing more; expected 'float32' or "
            "'float64'"
        )
    return name


def default_state_dtype(dtype: str) -> str:
    """What H and z are kept in unless the user says otherwise: float32, float64 for float64."""
    return "float64" if dtype == "float64" else "float32"
