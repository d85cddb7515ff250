"""An answer on its way to the client: whole, or as server-sent events; and watching if it left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, failed
from .protocol import Format, Part, StreamOptions
from .sequences import Piece
from .tickets import RequestFailed, Ticket

LINGER = 5.0
"""Seconds past a request's deadline that a client has to read what was sent."""


class Usage:
    """Tokens of a request; pieces tell how many an answer has."""

    def __init__(self, ticket: Ticket) -> None:
        self._prompt = sum(len(job.prompt) for job in ticket.jobs)
        self._completion: dict[int, int] = {}

    def add(self, pieces: list[Piece]) -> None:
        """Take note of what came."""
        self._completion.update((piece.choice, piece.tokens) for piece in pieces)

    def as_json(self) -> dict[str, int]:
        """By the API's names."""
        completion = sum(self._completion.values())
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": completion,
            "total_tokens": self._prompt + completion,
        }


async def answer_whole(ticket: Ticket, form: Format, request: Request) -> Response:
    """Wait for all of an answer; a client that leaves cancels it.

    Raises
    ------
    ApiError
        If it fails.
    """
    usage = Usage(ticket)
    count = sum(len(job.answers) for job in ticket.jobs)
    answers = [Part() for _ in range(count)]
    failure = None
    async with anyio.create_task_group() as group:
        group.start_soon(_cancel_on_disconnect, ticket, request.receive)
        try:
            async for pieces in ticket.pieces():
                usage.add(pieces)
                for piece in pieces:
                    answers[piece.choice].add(piece)
        except RequestFailed as error:
            failure = failed(error.reason, ticket.timeout)
        finally:
            ticket.cancel()
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return JSONResponse(form.whole(answers, usage.as_json()))


class EventStream(Response):
    """An answer as server-sent events.

    The status is not sent before the first token is there, so that what fails while it waits is
    answered with a status of its own.

    Parameters
    ----------
    ticket
        Already submitted.
    form
        The chunks' JSON.
    options
        What the stream tells beside the text.
    """

    def __init__(self, ticket: Ticket, form: Format, options: StreamOptions) -> None:
        super().__init__()
        self._ticket = ticket
        self._form = form
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as ASGI has it."""
        # A client that neither reads nor leaves blocks `send`; it must not do so for ever.
        seconds = self._ticket.timeout + LINGER
        try:
            with anyio.move_on_after(seconds):
                async with anyio.create_task_group() as group:
                    group.start_soon(_cancel_on_disconnect, self._ticket, receive)
                    with contextlib.suppress(OSError):
                        await self._send(scope, receive, send)
                    group.cancel_scope.cancel()
        finally:
            self._ticket.cancel()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events()
        try:
            first = await anext(events)
        except RequestFailed as error:
            refusal = failed(error.reason, self._ticket.timeout)
            await error_response(refusal)(scope, receive, send)
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: str, more: bool = True) -> None:
            body = data.encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await write(first)
            async for event in events:
                await write(event)
        except RequestFailed as error:
            await write(_event(failed(error.reason, self._ticket.timeout).body()), more=False)
            return
        await write("data: [DONE]\n\n", more=False)

    async def _events(self) -> AsyncIterator[str]:
        usage = Usage(self._ticket)
        opening = self._form.opening(sum(len(job.answers) for job in self._ticket.jobs))
        text = "".join(map(_event, opening))
        async for pieces in self._ticket.pieces():
            usage.add(pieces)
            for index, part in _joined(pieces):
                chunk = self._form.chunk(index, part)
                if self._options.continuous_usage_stats:
                    chunk["usage"] = usage.as_json()
                text += _event(chunk)
            yield text
            text = ""
        if self._options.include_usage:
            yield _event(self._form.usage_chunk(usage.as_json()))


def error_response(error: ApiError) -> Response:
    """An error as a response of its own."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _joined(pieces: list[Piece]) -> list[tuple[int, Part]]:
    """What came of each choice, as one, if it is anything to tell."""
    parts: dict[int, Part] = {}
    for piece in pieces:
        parts.setdefault(piece.choice, Part()).add(piece)
    return [(i, part) for i, part in parts.items() if part.text or part.finish or part.scored]


async def _cancel_on_disconnect(ticket: Ticket, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
