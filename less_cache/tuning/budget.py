"""How many bytes a cache may take."""

from __future__ import annotations

import math
from typing import Any

from .._checks import check_int
from ..config import CacheConfig

UNITS = {"%": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


def parse_budget(budget: Any, config: CacheConfig, context: int) -> int:
    """Bytes of one sequence's cache, all counted.

    Parameters
    ----------
    budget
        Bytes as an integer; or a share of the full cache's in 16 bits, a float in (0, 1) or like
        ``"5%"``; or bytes as text, ``"300000"``, ``"300k"``, ``"2.5M"``, ``"1G"``.
    config
        The model's shapes.
    context
        The longest sequence that the full cache is counted for.

    Raises
    ------
    ValueError, TypeError
        If it is none of these, or no less than the full cache.
    """
    full = config.full_cache_bytes(check_int("context", context, minimum=1), "float16")
    expected = 'bytes like 300000 or "300k", or a share like 0.05 or "5%"'
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"budget: got {budget!r}, expected {expected}")
    if isinstance(budget, str):
        text = budget.strip()
        unit = UNITS.get(text[-1:])
        try:
            found = float(text if unit is None else text[:-1])
        except ValueError:
            raise ValueError(f"budget: got {budget!r}, expected {expected}") from None
        if text.endswith("%"):
            found *= full / 100
        else:
            found *= unit or (full if found < 1 else 1)
    else:
        found = budget * full if budget < 1 else float(budget)
    if not math.isfinite(found) or not 1 <= found < full:
        raise ValueError(
            f"budget: got {budget!r}, expected {expected}, and less than the full cache's "
            f"{full:,} bytes at {context} tokens"
        )
    return int(found)
