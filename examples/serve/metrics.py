"""What ``/metrics`` tells Prometheus, in a registry of its own: two servers may share a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .model import ServedModel
    from .scheduler import Scheduler

PREFIX = "less_cache_"
STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SECONDS_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """The server's counters; the scheduler reports to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}requests",
            "Requests by outcome: completed, cancelled, timeout, shutdown, error, or refused as "
            "invalid, queue_full, draining or dead.",
            ["outcome"],
            registry=self.registry,
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._step = self._histogram(
            "step_seconds", "Time of a decode step: of one more token of every row.", STEP_BUCKETS
        )
        self._rows = self._histogram(
            "step_rows", "Rows of a decode step.", (1, 2, 4, 8, 16, 32, 64, 128, 256)
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival.", SECONDS_BUCKETS
        )
        self._request = self._histogram(
            "request_seconds", "From a request's arrival to its end.", SECONDS_BUCKETS
        )

    def watch(self, scheduler: Scheduler, model: ServedModel) -> None:
        """Add what is read off when asked for: rows, queue and bytes."""
        row, token = model.bytes_per_row, model.full_cache_bytes_per_token
        for name, text, read in (
            ("rows_running", "Sequences being decoded.", lambda: scheduler.running),
            ("queue_length", "Prompts without a first token.", lambda: scheduler.waiting),
            ("tokens_per_second", "Lately.", scheduler.generated.per_second),
            ("cache_row_bytes", "Of one sequence, at any length.", lambda: row),
            ("cache_bytes", "Of the running sequences.", lambda: row * scheduler.running),
            ("cache_allocated_bytes", "Of all rows.", lambda: scheduler.allocated_bytes),
            (
                "full_cache_bytes",
                "What a cache that forgets nothing would hold for the running sequences.",
                lambda: token * scheduler.tokens_held,
            ),
        ):
            Gauge(f"{PREFIX}{name}", text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def refused(self, outcome: str) -> None:
        """A request did not get as far as the scheduler."""
        self._requests.labels(outcome).inc()

    def first_token(self, seconds: float) -> None:
        """A request waited so long for its first token."""
        self._first_token.observe(seconds)

    def prompt_tokens(self, count: int) -> None:
        """So many were read."""
        self._prompt_tokens.inc(count)

    def generated_tokens(self, count: int) -> None:
        """So many were chosen."""
        self._generated_tokens.inc(count)

    def step(self, seconds: float, rows: int) -> None:
        """A step took in a token of every row."""
        self._step.observe(seconds)
        self._rows.observe(rows)

    def ended(self, outcome: str, seconds: float) -> None:
        """A request that the scheduler had accepted is over."""
        self._requests.labels(outcome).inc()
        self._request.observe(seconds)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{PREFIX}{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}{name}", text, buckets=buckets, registry=self.registry)
