"""The HTTP side: routes, errors, and the scheduler's life."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from . import protocol
from .answering import EventStream, answer_whole, error_response
from .errors import ApiError
from .guards import Guard
from .intake import chat_ticket, completion_ticket, read_request
from .metrics import Metrics
from .model import ServedModel
from .scheduler import Dead, Draining, Messages, QueueFull, Scheduler
from .settings import Settings
from .tickets import Ticket

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    # The page's empty icon.
    "img-src 'self' data:; base-uri 'none'; frame-ancestors 'none'"
)

FAILED = "The server has failed and ends; its log tells more"


class Service:
    """A model behind a scheduler, and its metrics: what the routes work with."""

    def __init__(self, model: ServedModel, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(model.decoder, settings, self.metrics)
        self.metrics.watch(self.scheduler, model)
        self.dead = asyncio.Event()
        """Set in the event loop when the scheduler has failed for good."""

    def submit(self, ticket: Ticket) -> None:
        """Hand a request to the scheduler.

        Raises
        ------
        ApiError
            If it takes none now.
        """
        try:
            self.scheduler.submit(ticket)
        except QueueFull:
            raise ApiError(
                429,
                f"{self.scheduler.waiting} prompts wait already; try again later",
                code="queue_full",
                retry_after=1,
                outcome="queue_full",
            ) from None
        except Dead:
            raise ApiError(503, FAILED, code="server_failed", outcome="dead") from None
        except Draining:
            raise ApiError(
                503,
                "The server is stopping",
                code="shutting_down",
                retry_after=5,
                outcome="draining",
            ) from None

    def stats(self) -> dict[str, Any]:
        """What the page shows."""
        scheduler, model = self.scheduler, self.model
        return {
            "model": model.name,
            "context": model.context,
            "rows_running": scheduler.running,
            "rows": self.settings.max_batch,
            "queue": scheduler.waiting,
            "tokens_per_second": round(scheduler.generated.per_second(), 1),
            "bytes_per_row": model.bytes_per_row,
            "cache_bytes": model.bytes_per_row * scheduler.running,
            "full_cache_bytes": model.full_cache_bytes_per_token * scheduler.tokens_held,
            "full_cache_bytes_per_token": model.full_cache_bytes_per_token,
        }

    async def drain(self) -> None:
        """Refuse new requests, wait for the accepted ones while the grace lasts, end the rest."""
        self.scheduler.drain()
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.shutdown_grace
        while not self.scheduler.idle and loop.time() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.scheduler.stop)


def create_app(service: Service) -> FastAPI:
    """The application; its life is the scheduler's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        service.scheduler.start(
            lambda messages: _post(loop, messages),
            lambda: loop.call_soon_threadsafe(service.dead.set),
        )
        yield
        await asyncio.to_thread(service.scheduler.stop)

    # No description of itself: the routes read their requests on their own, so that it would tell
    # nothing, and it would be open where a key is asked for.
    app = FastAPI(title="less_cache", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, hosts=service.settings.allowed_hosts)
    app.include_router(_api(service))
    app.include_router(_views(service))

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        if error.outcome is not None:
            service.metrics.refused(error.outcome)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "Internal error", code="internal_error"))

    return app


def _api(service: Service) -> APIRouter:
    async def check_key(request: Request) -> None:
        key = service.settings.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which Starlette shows as Latin-1; a key is sent as UTF-8.
        right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "The API key is missing or wrong", code="invalid_api_key")

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    model = service.model

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(model.name)]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model.name:
            raise ApiError(404, f"model: got {name!r}", param="model", code="model_not_found")
        return _card(name)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        asked = await read_request(request, protocol.CompletionRequest, model, service.settings)
        ticket = await completion_ticket(asked, model, service.settings)
        return await answer(ticket, protocol.CompletionFormat(model.name), asked, request)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await read_request(request, protocol.ChatRequest, model, service.settings)
        ticket = await chat_ticket(asked, model, service.settings)
        return await answer(ticket, protocol.ChatFormat(model.name), asked, request)

    async def answer(
        ticket: Ticket, form: protocol.Format, asked: protocol.Request, request: Request
    ) -> Response:
        service.submit(ticket)
        if asked.stream:
            return EventStream(ticket, form, asked.stream_options or protocol.StreamOptions())
        return await answer_whole(ticket, form, request)

    return router


def _views(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/")
    async def page() -> Response:
        text = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        return service.stats()

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/health")
    @router.get("/healthz")
    async def health() -> Response:
        if service.scheduler.dead:
            return JSONResponse({"status": "failed"}, 503)
        if service.scheduler.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    return router


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "less_cache"}


def _post(loop: asyncio.AbstractEventLoop, messages: Messages) -> None:
    """Deliver in the event loop's thread: one call a turn, however many rows it has."""

    def deliver() -> None:
        for ticket, message in messages:
            ticket.deliver(message)

    loop.call_soon_threadsafe(deliver)
