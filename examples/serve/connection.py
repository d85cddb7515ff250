"""`Connection`: uvicorn's HTTP/1.1, for clients that are slow, silent, many, or half gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .answering import error_response
from .errors import ApiError

HEAD_SECONDS = 10.0
"""In which a client has to send a request's head, once it has connected or begun to."""

STALL_SECONDS = 30.0
"""That a client may read nothing while more is to be sent than buffers hold."""

PROBES = (0.05, 0.2, 1.0)
"""Seconds between signs of life to a client that sends no more: see `Connection.eof_received`."""


class Connection(H11Protocol):
    """One client's connection.

    uvicorn closes an idle connection after an answer, and waits for ever before one. Here a
    request's head has to come in time, and so has room for an answer. Where there are as many
    connections as allowed, a new one takes the place of the one that has sent no whole request for
    longest; only if all are being answered, it is told to come back.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn's own refusal is plain text, and makes no room.
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._half_closed = False
        self._since = self.loop.time()

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        if self._most is not None:
            self._make_room(self._most)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()
        if not self._idle:
            self._time_head()
        elif self._half_closed:
            self.transport.close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer a client that has sent all it will, though it may also have left.

        Both look the same from here. To one that has left the system answers a first sign of life
        with a reset, which ends the connection at the next. The sign is an interim response,
        which clients skip; those of HTTP/1.0 do not know it and get none.
        """
        if self._idle or self.cycle.more_body:
            return None
        self._half_closed = True
        if self.scope["http_version"] != "1.0":
            self._probe(PROBES)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for what is no HTTP."""
        self._refuse(ApiError(400, msg))

    def _time_head(self) -> None:
        if not self._idle and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._idle and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        begun = bool(self.conn.trailing_data[0])
        if begun and not self.transport.is_closing():
            self._refuse(ApiError(408, f"The request's head took longer than {HEAD_SECONDS:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            response = h11.Response(
                status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _make_room(self, most: int) -> None:
        there = [c for c in self.connections if not c.transport.is_closing()]
        if len(there) <= most:
            return
        waiting = [
            c
            for c in there
            if isinstance(c, Connection) and c is not self and (c._idle or c.cycle.more_body)
        ]
        if waiting:
            min(waiting, key=lambda c: c._since).transport.abort()
        else:
            self.app = _crowded

    def _probe(self, delays: Sequence[float]) -> None:
        if self.transport.is_closing() or self._idle or self.cycle.response_started:
            return
        sign = h11.InformationalResponse(status_code=102, headers=[], reason="Processing")
        self.transport.write(self.conn.send(sign) or b"")
        if delays:
            self.loop.call_later(delays[0], self._probe, delays[1:])


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        503, "Too many connections; try again later", code="too_many_connections", retry_after=1
    )
    response = error_response(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
