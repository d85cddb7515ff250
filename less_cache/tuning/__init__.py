"""The best cache for a number of bytes: measure heads, hand out bytes, train, judge."""

from .effort import Effort
from .report import save_report
from .tune import Tuned, tune

__all__ = ["Effort", "Tuned", "save_report", "tune"]
