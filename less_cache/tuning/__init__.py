"""The best cache for a number of bytes: measure heads, hand out slots, check."""

from .allocation import hand_out
from .measuring import HeadLosses, measure_heads

__all__ = ["HeadLosses", "hand_out", "measure_heads"]
