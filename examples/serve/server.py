"""uvicorn, but for how it stops: first refuse, then finish, then close."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from .app import Service, create_app
from .connection import Connection

CLOSE_SECONDS = 5
"""For connections that still read when all answers have ended."""

KEEP_ALIVE_SECONDS = 10
"""Of an idle connection; clients' pools (httpx: 5 s) must give one up before the server does.

Not much longer, since uvicorn keeps what belongs to a client that hung up for as long.
"""

DEAD_SECONDS = 3.0
"""That a server whose scheduler has failed still tells so, before it ends."""


class Server(uvicorn.Server):
    """Stops in order at the first SIGTERM or SIGINT, and at once at the second.

    uvicorn alone would close its sockets first, and a new client would find nobody instead of a
    503; and it would wait for streams without knowing how long they take.

    It also ends where the scheduler has failed for good; see `Scheduler.dead`.
    """

    def __init__(self, service: Service, host: str, port: int, *, access_log: bool = True) -> None:
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False
        self._stopping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=host,
                port=port,
                http=Connection,
                # Without an implementation a wish to upgrade is passed over, as HTTP has it.
                ws="none",
                # The scheduler's settings bound the work; this bounds file descriptors.
                limit_concurrency=service.settings.max_connections,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                access_log=access_log,
            )
        )
        logging.getLogger("uvicorn.access").addFilter(_worth_a_line)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; notes the loop that signals have to reach."""
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.create_task(self._end_when_dead())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls for a signal, between any two instructions of the main thread."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        elif self._told:
            super().handle_exit(sig, frame)
            self.force_exit = True
            self._loop.call_soon_threadsafe(self._drop_connections)
        else:
            self._told = True
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True

    def _drop_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _end_when_dead(self) -> None:
        await self._service.dead.wait()
        await asyncio.sleep(DEAD_SECONDS)
        self.should_exit = True


def _worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a request is to be logged: the page asks for its figures twice a second."""
    args = record.args
    return not (isinstance(args, tuple) and len(args) == 5 and args[2:5:2] == ("/stats", 200))
