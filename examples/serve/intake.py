"""From a request's bytes to a ticket: limits, tokens, and what each answer is to be."""

from __future__ import annotations

from typing import TypeVar

import anyio
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from . import protocol
from .errors import ApiError, invalid
from .model import ServedModel
from .sequences import Answer, Generation
from .settings import Settings
from .tickets import Job, Ticket

COMPLETION_TOKENS = 16
"""The API's own default for completions."""

BODY_SECONDS = 10.0
"""A client that takes longer to send its request is not waited for."""

Kind = TypeVar("Kind", bound=protocol.Request)


async def read_request(
    request: HttpRequest, kind: type[Kind], model: ServedModel, settings: Settings
) -> Kind:
    """Read and check a request's body, giving up on one that is too long or too slow.

    Raises
    ------
    ApiError
        If it is no such request.
    """
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > settings.max_body:
                    raise ApiError(413, f"The body has more than {settings.max_body:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"The body took longer than {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(499, "The client went away", code="cancelled", outcome="cancelled") from None
    try:
        return await model.aside(len(body), kind.model_validate_json, bytes(body))
    except ValidationError as error:
        raise invalid(error) from None


async def completion_ticket(
    request: protocol.CompletionRequest, model: ServedModel, settings: Settings
) -> Ticket:
    """A ticket for a request of /v1/completions.

    Raises
    ------
    ApiError
        If a limit is passed.
    """
    prompts = request.prompts()
    if len(prompts) > settings.max_queue:
        raise ApiError(
            400, f"prompt: got {len(prompts)}, at most {settings.max_queue}", param="prompt"
        )
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        _check_length(text, model, "prompt")

    def encode() -> list[list[int]]:
        return [model.encode(p) if isinstance(p, str) else p for p in prompts]

    tokens = await model.aside(sum(map(len, texts)), encode)
    largest = max((max(ids, default=0) for ids in tokens), default=0)
    if largest >= model.decoder.manifest.vocab_size:
        raise ApiError(
            400,
            f"prompt: got token {largest}, expected 0 to {model.decoder.manifest.vocab_size - 1}",
            param="prompt",
        )
    wanted = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    shown = None
    if request.echo:
        shown = [p if isinstance(p, str) else model.tokenizer.decode(p) for p in prompts]
    return _ticket(request, tokens, wanted, "prompt", model, settings, shown)


async def chat_ticket(
    request: protocol.ChatRequest, model: ServedModel, settings: Settings
) -> Ticket:
    """A ticket for a request of /v1/chat/completions.

    Raises
    ------
    ApiError
        If a limit is passed.
    """
    messages = [message.plain() for message in request.messages]
    texts = [message["content"] for message in messages]
    for text in texts:
        _check_length(text, model, "messages")
    tokens = await model.aside(sum(map(len, texts)), model.encode_chat, messages)
    wanted = request.max_completion_tokens or request.max_tokens
    if wanted is None:
        wanted = max(1, min(settings.max_tokens, model.context - len(tokens)))
    return _ticket(request, [tokens], wanted, "messages", model, settings)


def _check_length(text: str, model: ServedModel, param: str) -> None:
    """Refuse a text that is much too long without looking at what it says."""
    most = model.most_characters
    if most is not None and len(text) > most:
        raise ApiError(
            400,
            f"{param}: got a text of {len(text):,} characters; the context of {model.context} "
            f"tokens never holds more than {most:,}",
            param=param,
            code="context_length_exceeded",
        )


def _ticket(
    request: protocol.Request,
    prompts: list[list[int]],
    max_tokens: int,
    param: str,
    model: ServedModel,
    settings: Settings,
    shown: list[str] | None = None,
) -> Ticket:
    """A ticket for prompts, of which `shown` is what is to stand before the answers."""
    if request.model != model.name:
        raise ApiError(
            404,
            f"model: got {request.model!r}, this server has only {model.name!r}",
            param="model",
            code="model_not_found",
        )
    if max_tokens > settings.max_tokens:
        raise ApiError(
            400, f"max_tokens: got {max_tokens}, at most {settings.max_tokens}", param="max_tokens"
        )
    if request.n > settings.max_choices:
        raise ApiError(400, f"n: got {request.n}, at most {settings.max_choices}", param="n")
    for tokens in prompts:
        if not tokens:
            raise ApiError(400, f"{param}: got no tokens, expected at least one", param=param)
        if len(tokens) + max_tokens > model.context:
            raise ApiError(
                400,
                f"{param}: {len(tokens)} tokens and {max_tokens} new ones are more than the "
                f"context of {model.context}",
                param=param,
                code="context_length_exceeded",
            )
    generation = Generation(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        seed=request.seed,
        stop=tuple(request.stop),
        logprobs=request.top(),
        echo=shown is not None,
    )
    ticket = Ticket(settings.request_timeout)
    for first, tokens in enumerate(prompts):
        answers = [
            Answer(
                first * request.n + i,
                tokens,
                generation,
                model.tokenizer,
                model.end_tokens,
                shown[first] if shown else "",
            )
            for i in range(request.n)
        ]
        ticket.jobs.append(Job(ticket, tokens, answers, generation.scores_prompt))
    return ticket
