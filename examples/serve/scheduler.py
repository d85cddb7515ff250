"""`Scheduler`: the thread that decodes; requests join and leave its batch between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from exporters.onnx import OnnxDecoder

from .batch import RowBatch, last_logits
from .rates import Rate
from .sequences import Answer, Piece
from .settings import Settings
from .tickets import Failure, Job, Ticket

logger = logging.getLogger("uvicorn.error")

Messages = list[tuple[Ticket, Piece | Failure | None]]
"""What to `Ticket.deliver`, in order."""


class Observer(Protocol):
    """What is counted; `metrics.Metrics` is one."""

    def first_token(self, seconds: float) -> None: ...
    def prompt_tokens(self, count: int) -> None: ...
    def first_tokens(self, count: int) -> None: ...
    def step(self, seconds: float, rows: int) -> None: ...
    def ended(self, outcome: str, seconds: float) -> None: ...


class QueueFull(Exception):  # noqa: N818 - expected under load
    """No more prompts may wait."""


class Draining(Exception):  # noqa: N818 - expected when the server stops
    """The server stops, and takes no more requests."""


class Scheduler:
    """Decodes all running sequences together, one token a step.

    Each turn frees the rows of requests that were cancelled or are late, admits waiting prompts to
    free rows, reads at most a chunk of prompts, and makes one step. All in one thread; others call
    `submit`, `drain`, `stop` and the properties.

    Parameters
    ----------
    decoder
        Used by nobody else meanwhile.
    settings
        The limits.
    observer
        Told what happens, in the scheduler's thread.
    """

    def __init__(self, decoder: OnnxDecoder, settings: Settings, observer: Observer) -> None:
        self._decoder = decoder
        self._settings = settings
        self._observer = observer
        self._batch = RowBatch(decoder, settings.max_batch)
        self._running: list[tuple[Job, Answer]] = []  # in the order of the batch's rows
        self._reading: deque[Job] = deque()  # admitted: rows are reserved, the prompt is not read
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = self._draining = False
        self._outbox: Messages = []
        self._send: Callable[[Messages], None] = lambda messages: None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.generated = Rate()

    def start(self, send: Callable[[Messages], None]) -> None:
        """Begin; `send` is called in the scheduler's thread, once a turn."""
        self._send = send
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request's jobs: all of them, or none.

        Raises
        ------
        Draining, QueueFull
            If it is refused.
        """
        with self._wake:
            if self._draining:
                raise Draining
            if len(self._waiting) + len(ticket.jobs) > self._settings.max_queue:
                raise QueueFull
            ticket.unfinished = sum(len(job.answers) for job in ticket.jobs)
            self._waiting.extend(ticket.jobs)
            self._wake.notify()

    def drain(self) -> None:
        """Refuse new requests from now on; accepted ones go on."""
        with self._wake:
            self._draining = True

    def stop(self) -> None:
        """End all requests and the thread."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        with self._wake:
            return not (self._waiting or self._reading or self._running)

    @property
    def running(self) -> int:
        """Rows in use."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Prompts whose first token was not chosen yet."""
        return len(self._waiting) + len(self._reading)

    @property
    def tokens_held(self) -> int:
        """Tokens that the running sequences have seen: what a full cache would hold."""
        return sum(len(job.prompt) + answer.tokens - 1 for job, answer in tuple(self._running))

    @property
    def allocated_bytes(self) -> int:
        """Of the rows, free ones included."""
        return self._batch.nbytes

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting or self._reading or self._running):
                    self._wake.wait()
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception:
                # The rows may be half written. Whoever waits is told; later requests start anew.
                logger.exception("A decode step failed")
                self._end_all("error")
                self._batch = RowBatch(self._decoder, self._settings.max_batch)
            self._flush()
        self._end_all("shutdown")
        self._flush()

    def _turn(self) -> None:
        self._drop_ended()
        self._admit()
        self._read_prompts()
        self._step()

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._wake:
            jobs = [*self._waiting, *self._reading, *(job for job, _ in self._running)]
        for ticket in {id(job.ticket): job.ticket for job in jobs}.values():
            if ticket.cancelled:
                self._fail(ticket, "cancelled")
            elif now > ticket.deadline:
                self._fail(ticket, "timeout")
        with self._wake:
            if any(job.ticket.ended for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.ticket.ended)
        self._reading = deque(job for job in self._reading if not job.ticket.ended)
        for row in range(len(self._running) - 1, -1, -1):
            if self._running[row][0].ticket.ended:
                self._leave(row)

    def _admit(self) -> None:
        """In the order of arrival: a request for many rows is not overtaken for ever."""
        reserved = sum(len(job.answers) for job in self._reading)
        free = self._settings.max_batch - len(self._running) - reserved
        with self._wake:
            while self._waiting and len(self._waiting[0].answers) <= free:
                job = self._waiting.popleft()
                free -= len(job.answers)
                self._reading.append(job)

    def _read_prompts(self) -> None:
        """Feed prompts, up to a chunk's tokens in all; whoever is complete joins the batch.

        A prompt is cut at the same places whatever else goes on: where a chunk ends, the policy
        evicts, so other cuts would give other answers.
        """
        chunk = self._settings.prefill_chunk
        spent = 0
        while self._reading:
            job = self._reading[0]
            tokens = job.prompt[job.taken : job.taken + chunk]
            if spent and spent + len(tokens) > chunk:
                return
            spent += len(tokens)
            job.state = job.state or self._decoder.new_state(1)
            logits = last_logits(self._decoder.append(job.state, np.array([tokens])))[0]
            job.taken += len(tokens)
            self._observer.prompt_tokens(len(tokens))
            if job.taken == len(job.prompt):
                self._reading.popleft()
                self._join(job, logits)

    def _join(self, job: Job, logits: np.ndarray) -> None:
        ticket, state = job.ticket, job.state
        assert state is not None
        if not ticket.started:
            ticket.started = True
            self._observer.first_token(time.monotonic() - ticket.submitted)
        for answer in job.answers:
            if not self._advance(job, answer, logits):
                self._batch.join(state)
                self._running.append((job, answer))
        self._observer.first_tokens(len(job.answers))
        self.generated.add(len(job.answers))
        job.state = None

    def _step(self) -> None:
        if not self._running:
            return
        started = time.perf_counter()
        logits = self._batch.step([answer.last_token for _, answer in self._running])
        rows = range(len(self._running))
        finished = [row for row in rows if self._advance(*self._running[row], logits[row])]
        for row in reversed(finished):
            self._leave(row)
        self._observer.step(time.perf_counter() - started, len(rows))
        self.generated.add(len(rows))

    def _advance(self, job: Job, answer: Answer, logits: np.ndarray) -> bool:
        """Choose an answer's next token; whether it was the last."""
        ticket = job.ticket
        piece = answer.advance(logits)
        self._outbox.append((ticket, piece))
        if piece.finish is None:
            return False
        ticket.unfinished -= 1
        if ticket.unfinished == 0:
            ticket.ended = True
            self._outbox.append((ticket, None))
            self._observer.ended("completed", time.monotonic() - ticket.submitted)
        return True

    def _leave(self, row: int) -> None:
        """As `RowBatch.leave` does it: the last row takes the place of the freed one."""
        self._batch.leave(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last

    def _fail(self, ticket: Ticket, reason: Failure) -> None:
        if not ticket.ended:
            ticket.ended = True
            self._outbox.append((ticket, reason))
            self._observer.ended(reason, time.monotonic() - ticket.submitted)

    def _end_all(self, reason: Failure) -> None:
        with self._wake:
            jobs = [*self._waiting, *self._reading, *(job for job, _ in self._running)]
            self._waiting.clear()
            self._reading.clear()
            self._running.clear()
        for job in jobs:
            self._fail(job.ticket, reason)

    def _flush(self) -> None:
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self._send(messages)
