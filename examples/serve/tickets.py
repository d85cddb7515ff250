"""A request on its way: `Ticket` is what the event loop and the scheduler's thread share of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from exporters.onnx import OnnxState

from .sequences import Answer, Piece

Failure = Literal["timeout", "shutdown", "cancelled", "error"]
"""Why a request ended without its answers."""


@dataclass(eq=False)
class Job:
    """A prompt, and the answers that go on from it.

    Attributes
    ----------
    prompt : list of int
        Token ids, at least one.
    answers : list of Answer
        Each takes a row; the prompt is read once for all of them.
    one_by_one : bool
        Only the prompt's first token is read ahead of the answers; they take in the others.
    taken : int
        Tokens that were read ahead.
    """

    ticket: Ticket
    prompt: list[int]
    answers: list[Answer]
    one_by_one: bool = False
    taken: int = 0
    state: OnnxState | None = None

    @property
    def ahead(self) -> list[int]:
        """Tokens to be read before the answers take rows."""
        return self.prompt[:1] if self.one_by_one else self.prompt


@dataclass(eq=False)
class Ticket:
    """One request.

    The scheduler's thread sends; the event loop receives, and may cancel.

    Parameters
    ----------
    timeout
        Seconds from now to the end.
    """

    timeout: float
    jobs: list[Job] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    ended: bool = False
    """No row is, or will be, taken for it; the scheduler's."""
    unfinished: int = 0
    """Answers that go on; the scheduler's."""
    started: bool = False
    """Whether its first token was chosen; the scheduler's."""
    _pieces: deque[Piece] = field(default_factory=deque)
    _failure: Failure | None = None
    _finished: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def deadline(self) -> float:
        """By `time.monotonic`."""
        return self.submitted + self.timeout

    def cancel(self) -> None:
        """Nobody waits for it any more: its rows are freed before the next step."""
        self.cancelled = True

    def deliver(self, message: Piece | Failure | None) -> None:
        """Take a message in the event loop's thread; ``None``: all answers have ended."""
        if isinstance(message, Piece):
            self._pieces.append(message)
        else:
            self._failure = message
            self._finished = True
        self._news.set()

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What came since the last time, until all answers have ended.

        A client that reads slowly gets more at once; it does not hold up the others.

        Raises
        ------
        RequestFailed
            If the request ends without its answers.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            news = list(self._pieces)
            self._pieces.clear()
            if news:
                yield news
            if self._finished and not self._pieces:
                if self._failure is not None:
                    raise RequestFailed(self._failure)
                return


class RequestFailed(Exception):  # noqa: N818 - what happened, not a mistake of the program
    """A request ended without its answers, for `reason`."""

    def __init__(self, reason: Failure) -> None:
        super().__init__(reason)
        self.reason = reason
