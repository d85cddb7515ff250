"""The requests of OpenAI's completions and chat API, and the answers' JSON."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
    "top_logprobs": (0,),
}
"""Parameters of the API that are not supported, with the values that ask for nothing."""


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
            if value is not None and not (name in NEUTRAL and value in NEUTRAL[name])
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


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]

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

    def whole(self, answers: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """All of it, of (text, finish reason) pairs."""
        choices = [
            {"index": i, **self._text(text), "logprobs": None, "finish_reason": finish}
            for i, (text, finish) in enumerate(answers)
        ]
        return {**self._frame, "object": self.whole_object, "choices": choices, "usage": usage}

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A part of one choice; its last has a finish reason."""
        choice = {"index": index, **self._part(text), "logprobs": None, "finish_reason": finish}
        return {**self._frame, "object": self.chunk_object, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """What ends a stream with ``include_usage``."""
        return {**self._frame, "object": self.chunk_object, "choices": [], "usage": usage}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks that come before any text."""
        return []

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


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        chunks = [self.chunk(index, "", None) for index in range(choices)]
        for chunk in chunks:
            chunk["choices"][0]["delta"] = first
        return chunks

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}
