"""The requests of OpenAI's completions and chat API, and the answers' JSON."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .logprobs import Scored
from .logprobs import Token as ShownToken
from .sequences import Piece

Token = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
}
"""Values that ask for nothing; most of these parameters take no other here."""

MOST_LOGPROBS = 20


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far in every chunk, as vLLM has it."""


class Request(BaseModel, ABC):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    n: int = Field(1, ge=1)
    seed: int | None = None
    stop: list[StopString] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            # False is no 0: a completion without likeliest tokens still has the taken ones'.
            if value is not None
            and not any(value == v and type(value) is type(v) for v in NEUTRAL.get(name, ()))
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_are_for_streams(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @abstractmethod
    def top(self) -> int | None:
        """How many of the likeliest tokens to tell; ``None``: no probabilities at all."""


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_one_kind(cls, value: Any) -> Any:
        def tokens(x: Any) -> bool:
            return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)

        ok = isinstance(value, str) or (
            isinstance(value, list)
            and len(value) > 0
            and (tokens(value) or all(isinstance(x, str) or (tokens(x) and x) for x in value))
            and len({type(x) for x in value}) == 1
        )
        if not ok:
            raise ValueError("expected a text, token ids, or a list of texts or of token ids")
        return value

    @model_validator(mode="after")
    def _nothing_is_for_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: got 0, expected at least 1; 0 is for echo: true")
        return self

    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """As a list, of texts or of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _top_is_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        return self

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass
class Part:
    """What came of one choice: all of it, or what a chunk brings."""

    text: str = ""
    finish: str | None = None
    scored: list[Scored] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Go on with it."""
        self.text += piece.text
        self.finish = piece.finish
        self.scored += piece.scored


class Format(ABC):
    """The JSON of one request's answer, whole or in chunks.

    Parameters
    ----------
    model
        The served model's name.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self._frame = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answers: list[Part], usage: dict[str, int]) -> dict[str, Any]:
        """All of it, in the choices' order."""
        choices = [self._choice(i, self._text(part.text), part) for i, part in enumerate(answers)]
        return {**self._frame, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        """A part of one choice; its last has a finish reason."""
        choice = self._choice(index, self._part(part.text), part)
        return {**self._frame, "object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """What ends a stream with ``include_usage``."""
        return {**self._frame, "object": self.chunk_object, "choices": [], "usage": usage}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks that come before any text."""
        return []

    def _choice(self, index: int, text: dict[str, Any], part: Part) -> dict[str, Any]:
        logprobs = self._logprobs(part.scored) if part.scored else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": part.finish}

    @abstractmethod
    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]: ...

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, text: str) -> dict[str, Any]: ...


class CompletionFormat(Format):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _part = _text

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        return {
            "tokens": [one.token.text for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [self._likeliest(one) for one in scored],
            "text_offset": [one.offset for one in scored],
        }

    def _likeliest(self, one: Scored) -> dict[str, float] | None:
        """By their texts, the taken token always among them; of two with one text the likelier."""
        if one.logprob is None:
            return None
        return {
            token.text: logprob for token, logprob in [(one.token, one.logprob), *one.top[::-1]]
        }


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        chunks = [self.chunk(index, Part()) for index in range(choices)]
        for chunk in chunks:
            chunk["choices"][0]["delta"] = first
        return chunks

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        content = [
            {
                **_entry(one.token, one.logprob),
                "top_logprobs": [_entry(token, logprob) for token, logprob in one.top],
            }
            for one in scored
        ]
        return {"content": content, "refusal": None}


def _entry(token: ShownToken, logprob: float | None) -> dict[str, Any]:
    # Of a part of a character the bytes are not told: the tokenizer only gives texts.
    return {
        "token": token.text,
        "logprob": logprob,
        "bytes": list(token.text.encode()) if token.whole else None,
    }
