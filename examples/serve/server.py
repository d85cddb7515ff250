"""uvicorn, but for how it stops: first refuse, then finish, then close."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn

from .app import Service, create_app

CLOSE_SECONDS = 5
"""For connections that still read when all answers have ended."""

KEEP_ALIVE_SECONDS = 10
"""Of an idle connection; clients' pools (httpx: 5 s) must give one up before the server does.

Not much longer, since uvicorn keeps what belongs to a client that hung up for as long.
"""


class Server(uvicorn.Server):
    """Stops in order at the first SIGTERM or SIGINT, and at once at the second.

    uvicorn alone would close its sockets first, and a new client would find nobody instead of a
    503; and it would wait for streams without knowing how long they take.
    """

    def __init__(self, service: Service, host: str, port: int) -> None:
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=host,
                port=port,
                # The scheduler's settings bound the work; this bounds file descriptors.
                limit_concurrency=service.settings.max_connections,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                access_log=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; notes the loop that signals have to reach."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn calls for a signal, between any two instructions of the main thread."""
        if self._loop is None or self._service.scheduler.draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True
