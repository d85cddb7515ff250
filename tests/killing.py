"""A thread that kills workers of a Ray cluster on this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable


class Killer(threading.Thread):
    """Kills, as soon as `ready` says so, the workers that run a task of that name."""

    def __init__(self, task: str, ready: Callable[[], bool]) -> None:
        super().__init__(daemon=True)
        self.task, self.ready = task, ready
        self.killed = 0

    def run(self) -> None:
        import psutil

        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self.ready():
            time.sleep(0.01)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(f"ray::{self.task}" in word for word in child.cmdline()):
                    child.kill()
                    self.killed += 1
