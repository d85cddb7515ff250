"""`Rate`: how many a second, lately."""

from __future__ import annotations

import threading
import time
from collections import deque


class Rate:
    """Counts over the last seconds; any thread may add and read.

    Parameters
    ----------
    seconds
        How far back is counted.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._counts: deque[tuple[float, int]] = deque()
        self._total = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count now."""
        with self._lock:
            self._counts.append((time.monotonic(), count))
            self._total += count
            self._forget()

    def per_second(self) -> float:
        """The mean over the last seconds, idle ones included."""
        with self._lock:
            self._forget()
            return self._total / self._seconds

    def _forget(self) -> None:
        border = time.monotonic() - self._seconds
        while self._counts and self._counts[0][0] < border:
            self._total -= self._counts.popleft()[1]
