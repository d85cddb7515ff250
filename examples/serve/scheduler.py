"""`Scheduler`: the thread that decodes; requests join and leave its batch between two steps."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from exporters.onnx import OnnxDecoder, OnnxState

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
    def generated_tokens(self, count: int) -> None: ...
    def step(self, seconds: float, rows: int) -> None: ...
    def ended(self, outcome: str, seconds: float) -> None: ...


class QueueFull(Exception):  # noqa: N818 - expected under load
    """No more prompts may wait."""


class Draining(Exception):  # noqa: N818 - expected when the server stops
    """The server stops, and takes no more requests."""


class Dead(Exception):  # noqa: N818 - told to clients
    """The scheduler's thread has ended by an error, and nothing decodes any more."""


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
        self._open: set[Ticket] = set()  # submitted, not ended
        self._wake = threading.Condition()
        self._stopping = self._draining = self._dead = False
        self._outbox: Messages = []
        self._chosen = 0  # tokens, in this turn
        self._send: Callable[[Messages], None] = lambda messages: None
        self._died: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.generated = Rate()

    def start(self, send: Callable[[Messages], None], died: Callable[[], object]) -> None:
        """Begin.

        Parameters
        ----------
        send
            Called in the scheduler's thread, once a turn.
        died
            Called there if it ends by an error, after all requests were told.
        """
        self._send = send
        self._died = died
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request's jobs: all of them, or none.

        Raises
        ------
        Dead, Draining, QueueFull
            If it is refused.
        """
        with self._wake:
            if self._dead:
                raise Dead
            if self._draining:
                raise Draining
            if len(self._waiting) + len(ticket.jobs) > self._settings.max_queue:
                raise QueueFull
            ticket.unfinished = sum(len(job.answers) for job in ticket.jobs)
            self._waiting.extend(ticket.jobs)
            self._open.add(ticket)
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
    def dead(self) -> bool:
        """Whether the thread has ended by an error."""
        return self._dead

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
        return sum(job.taken + answer.steps - 1 for job, answer in tuple(self._running))

    @property
    def allocated_bytes(self) -> int:
        """Of the rows, free ones included."""
        return self._batch.nbytes

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
                self._flush()
            self._end_all("shutdown")
            self._flush()
        except BaseException:
            # Whatever it was: without this thread every request would wait for ever.
            logger.critical("The scheduler's thread failed; the server is of no use", exc_info=True)
            self._die()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._waiting or self._reading or self._running):
                self._wake.wait()
            return not self._stopping

    def _die(self) -> None:
        """Tell everybody, by as little code as may fail again."""
        with self._wake:
            self._dead = self._draining = True
            tickets = list(self._open)
            self._open.clear()
            for jobs in (self._waiting, self._reading, self._running):
                jobs.clear()
        # What the last turns made comes first: an answer may be complete.
        with contextlib.suppress(Exception):
            self._send([*self._outbox, *((ticket, "error") for ticket in tickets)])
        with contextlib.suppress(Exception):
            self._died()

    def _turn(self) -> None:
        self._drop_ended()
        self._admit()
        self._read_prompts()
        self._step()
        self._observer.generated_tokens(self._chosen)
        self.generated.add(self._chosen)
        self._chosen = 0

    def _drop_ended(self) -> None:
        now = time.monotonic()
        with self._wake:
            tickets = list(self._open)
        for ticket in tickets:
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
            if job.ticket.ended:
                self._reading.popleft()
                continue
            tokens = job.ahead[job.taken : job.taken + chunk]
            if spent and spent + len(tokens) > chunk:
                return
            spent += len(tokens)
            try:
                self._read(job, tokens)
            except Exception:
                logger.exception("A prompt failed")
                self._fail(job.ticket, "error")
            if job.taken == len(job.ahead):
                self._reading.popleft()

    def _read(self, job: Job, tokens: list[int]) -> None:
        state = job.state = job.state or self._decoder.new_state(1)
        logits = last_logits(self._decoder.append(state, np.array([tokens])))[0]
        job.taken += len(tokens)
        self._observer.prompt_tokens(len(tokens))
        if job.taken == len(job.ahead):
            self._join(job, state, logits)

    def _join(self, job: Job, state: OnnxState, logits: np.ndarray) -> None:
        for answer in job.answers:
            if self._advance(job, answer, logits):
                self._batch.join(state)
                self._running.append((job, answer))
        job.state = None

    def _step(self) -> None:
        if not self._running:
            return
        started = time.perf_counter()
        try:
            logits = self._batch.step([answer.last_token for _, answer in self._running])
        except Exception:
            # All rows are one call, which may have left any of them half written.
            logger.exception("A decode step failed")
            for job, _ in self._running:
                self._fail(job.ticket, "error")
            self._running.clear()
            self._batch = RowBatch(self._decoder, self._settings.max_batch)
            return
        rows = range(len(self._running))
        going_on = [self._advance(*self._running[row], logits[row]) for row in rows]
        for row in reversed(rows):
            if not going_on[row]:
                self._leave(row)
        self._observer.step(time.perf_counter() - started, len(rows))

    def _advance(self, job: Job, answer: Answer, logits: np.ndarray) -> bool:
        """Let an answer take its next token; whether it goes on.

        What fails here concerns one request, and ends no other.
        """
        ticket = job.ticket
        if ticket.ended:  # by another of its answers
            return False
        before = answer.tokens
        try:
            piece = answer.advance(logits)
        except Exception:
            logger.exception("An answer failed")
            self._fail(ticket, "error")
            return False
        self._outbox.append((ticket, piece))
        if answer.tokens > before:
            self._chosen += 1
            if not ticket.started:
                ticket.started = True
                self._observer.first_token(time.monotonic() - ticket.submitted)
        elif job.one_by_one:
            self._observer.prompt_tokens(1)
        if piece.finish is None:
            return True
        ticket.unfinished -= 1
        if ticket.unfinished == 0:
            self._end(ticket, None, "completed")
        return False

    def _leave(self, row: int) -> None:
        """As `RowBatch.leave` does it: the last row takes the place of the freed one."""
        self._batch.leave(row)
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last

    def _fail(self, ticket: Ticket, reason: Failure) -> None:
        if not ticket.ended:
            self._end(ticket, reason, reason)

    def _end(self, ticket: Ticket, message: Failure | None, outcome: str) -> None:
        ticket.ended = True
        with self._wake:
            self._open.discard(ticket)
        self._outbox.append((ticket, message))
        self._observer.ended(outcome, time.monotonic() - ticket.submitted)

    def _end_all(self, reason: Failure) -> None:
        with self._wake:
            tickets = list(self._open)
            for jobs in (self._waiting, self._reading, self._running):
                jobs.clear()
        for ticket in tickets:
            self._fail(ticket, reason)

    def _flush(self) -> None:
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self._send(messages)
