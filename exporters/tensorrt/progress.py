"""Bars that show how far a build is, and Ctrl-C to end it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import tensorrt as trt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Monitor(trt.IProgressMonitor):
    """Bars of a build's phases, one below the other as they nest.

    Within a ``with`` block Ctrl-C does not interrupt Python, which would have to unwind TensorRT's
    threads: it makes the next `step_complete` tell TensorRT to stop.

    Parameters
    ----------
    title
        The name of what is built.
    show
        Draw the bars.

    Attributes
    ----------
    cancelled : bool
        Whether the build was asked to stop.
    """

    def __init__(self, title: str, show: bool = True) -> None:
        trt.IProgressMonitor.__init__(self)
        self.cancelled = False
        self._title = title
        self._depths: dict[str, int] = {}
        self._tasks: dict[str, Any] = {}
        # TensorRT calls from several threads.
        self._lock = threading.Lock()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            disable=not show,
        )
        self._previous: Any = None

    def __enter__(self) -> Monitor:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._cancel)
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT as a phase begins."""
        with self._lock:
            depth = self._depths.get(parent_phase, -1) + 1 if parent_phase else 0
            self._depths[phase_name] = depth
            name = phase_name if depth else f"{self._title}: {phase_name}"
            self._tasks[phase_name] = self._bars.add_task("  " * depth + name, total=num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT after each step of a phase; ``False`` ends the build."""
        with self._lock:
            if phase_name in self._tasks:
                self._bars.update(self._tasks[phase_name], completed=step + 1)
            return not self.cancelled

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT as a phase ends, also if it ends early."""
        with self._lock:
            self._depths.pop(phase_name, None)
            task = self._tasks.pop(phase_name, None)
            if task is not None:
                self._bars.remove_task(task)

    def _cancel(self, number: int, frame: FrameType | None) -> None:
        self.cancelled = True
