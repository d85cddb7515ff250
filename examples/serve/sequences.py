"""One answer in the making: how its tokens are chosen, what text they make, when it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporters.onnx.sampling import Sampler

from .detokenize import Decodes, Detokenizer, StopStrings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What a request asks of each of its answers, by the OpenAI API's names."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one decode step added to an answer.

    Attributes
    ----------
    choice : int
        Which of the request's answers.
    text : str
        May be empty.
    tokens : int
        Of the answer so far.
    finish : str or None
        Why it ended, if it did.
    """

    choice: int
    text: str
    tokens: int
    finish: FinishReason | None


class Answer:
    """One sequence of a request.

    Parameters
    ----------
    choice
        Its index in the request's answers.
    prompt
        Token ids.
    generation
        What was asked for. Answers of one request draw from different random numbers.
    tokenizer
        Decodes.
    end_tokens
        Tokens that end a text.

    Attributes
    ----------
    tokens : int
        How many were chosen.
    last_token : int
        The one to feed next.
    """

    def __init__(
        self,
        choice: int,
        prompt: Sequence[int],
        generation: Generation,
        tokenizer: Decodes,
        end_tokens: Collection[int],
    ) -> None:
        self.choice = choice
        self.tokens = 0
        self.last_token = -1
        self._generation = generation
        self._end_tokens = frozenset(end_tokens)
        seed = generation.seed
        self._sampler = Sampler(
            temperature=generation.temperature,
            top_p=generation.top_p,
            # The API allows negative seeds, NumPy does not.
            seed=None if seed is None else (seed + choice) % 2**63,
        )
        self._counts: dict[int, int] = {}
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(generation.stop)

    def advance(self, logits: np.ndarray) -> Piece:
        """Choose the next token from logits [vocabulary].

        Raises
        ------
        ValueError
            If they are no numbers to choose by.
        """
        if not np.isfinite(logits.max()):
            raise ValueError(f"logits: the greatest is {logits.max()}, expected a finite number")
        token = int(self._sampler.choose(self._penalised(logits)[None])[0])
        self._counts[token] = self._counts.get(token, 0) + 1
        self.tokens += 1
        self.last_token = token
        finish: FinishReason | None = None
        text = ""
        if token in self._end_tokens:
            finish = "stop"
        else:
            text = self._stops.push(self._detokenizer.push(token))
            if self._stops.found:
                finish = "stop"
            elif self.tokens >= self._generation.max_tokens:
                finish = "length"
        if finish is not None:
            text += self._stops.flush()
        return Piece(self.choice, text, self.tokens, finish)

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        frequency = self._generation.frequency_penalty
        presence = self._generation.presence_penalty
        if not self._counts or (frequency == 0 and presence == 0):
            return logits
        changed = logits.astype(np.float32)
        seen = np.fromiter(self._counts.keys(), np.int64)
        counts = np.fromiter(self._counts.values(), np.float32)
        changed[seen] -= frequency * counts + presence
        return changed
