"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from .tickets import Failure

SHOWN = 60
"""Characters of a wrong value that are repeated."""


class ApiError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status
        Of HTTP.
    message
        For people.
    param
        The request's field.
    code
        For programs.
    retry_after
        Seconds after which another try makes sense.
    outcome
        By which it is counted; ``None``: the scheduler has done so.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        outcome: str | None = "invalid",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.outcome = outcome
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 408:
            # What the client still sends of its request is no new one.
            self.headers["Connection"] = "close"

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(error: ValidationError) -> ApiError:
    """The first mistake that pydantic found in a request."""
    first = error.errors(include_url=False)[0]
    # A union's members are named behind the field: of these only the field is the client's.
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{param}: this server does not support it",
            param=param,
            code="unsupported_parameter",
        )
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_required_parameter")
    if not first["loc"] and first["type"] == "value_error":
        # Of parameters that do not go together: the reason names them.
        return ApiError(400, first["msg"].removeprefix("Value error, "), code="invalid_value")
    path = ".".join(str(part) for part in first["loc"]) or "The body"
    given = repr(first["input"])
    if len(given) > SHOWN:
        given = given[:SHOWN] + "..."
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{path}: got {given}: {reason}", param=param, code="invalid_value")


def failed(reason: Failure, timeout: float) -> ApiError:
    """What a client is told whose request the scheduler ended."""
    if reason == "timeout":
        message = f"The answer took longer than {timeout:g} s"
        return ApiError(504, message, code="timeout", outcome=None)
    if reason == "shutdown":
        message = "The server stopped"
        return ApiError(503, message, code="shutting_down", retry_after=5, outcome=None)
    if reason == "cancelled":
        return ApiError(499, "The client went away", code="cancelled", outcome=None)
    message = "The model failed; the server's log tells more"
    return ApiError(500, message, code="internal_error", outcome=None)
