"""Where requests may come from: `Guard` refuses foreign names of the server and foreign sites."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import error_response
from .errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
JSON = "application/json"
HEALTH = ("/health", "/healthz")
"""Probes ask for these by whatever address they know; the answer is nobody's secret."""


class Guard:
    """ASGI middleware that looks at where a request comes from, before anything else does.

    A page of another site can have a browser send requests here. Under a name of its own that it
    points to this machine (DNS rebinding), it could read the answers, too: the names are checked.
    What it can send without asking first is a form or plain text, never JSON: only JSON is taken.

    Parameters
    ----------
    app
        Sees what passes.
    hosts
        Names beside the loopback's that `Host` and `Origin` may have, without a port;
        ``*.example.com`` stands for all in a domain, ``*`` for any.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = [*LOOPBACK, *hosts]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it, as ASGI has it."""
        if scope["type"] == "http" and scope["path"] not in HEALTH:
            refusal = await self._refusal(scope)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not await self._allows(host):
            return ApiError(
                400,
                f"Host: got {host!r}, which is not allowed here; "
                "the server's option --allowed-host adds a name",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not await self._allows(origin.partition("://")[2]):
            return ApiError(
                403,
                f"Origin: got {origin!r}, which is not allowed here; "
                "the server's option --allowed-host adds a name",
                code="origin_not_allowed",
            )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != JSON:
                return ApiError(
                    415,
                    f"Content-Type: got {kind!r}, expected {JSON!r}",
                    code="unsupported_media_type",
                )
        return None

    async def _allows(self, host: str) -> bool:
        """Starlette decides; its answer is no JSON, so only whether it passes a request counts."""
        passed = False

        async def note(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal passed
            passed = True

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        async def drop(message: Message) -> None:
            pass

        check = TrustedHostMiddleware(note, self._hosts, www_redirect=False)
        scope = {"type": "http", "headers": [(b"host", host.encode("latin-1"))]}
        await check(scope, nothing, drop)
        return passed
