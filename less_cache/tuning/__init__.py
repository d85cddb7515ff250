"""The best cache for a number of bytes: measure heads, hand out bytes, train, judge."""

from .effort import Effort
from .report import save_report
from .tune import Tuned, measure_layers, tune

__all__ = ["Effort", "Tuned", "measure_layers", "save_report", "tune"]
