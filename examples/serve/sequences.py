"""One answer in the making: how its tokens are chosen, what text they make, when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from exporters.onnx import Sampler

from .detokenize import Decodes, Detokenizer, StopStrings
from .logprobs import Scored, Scorer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What a request asks of each of its answers, by the OpenAI API's names.

    `logprobs` is how many of the likeliest tokens are told beside the one that was taken; ``None``:
    not even that one's probability. `max_tokens` may be 0 for the prompt alone, with `echo`.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are scored, which needs them one by one."""
        return self.echo and self.logprobs is not None


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
    scored : list of Scored
        The step's tokens with their probabilities, if these were asked for.
    """

    choice: int
    text: str
    tokens: int
    finish: FinishReason | None
    scored: list[Scored] = field(default_factory=list)


class Answer:
    """One sequence of a request.

    Where the prompt is scored, it is fed token by token like an answer: its first token is read as
    a prompt, and the others are forced instead of chosen.

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
    prompt_text
        For `echo`.

    Attributes
    ----------
    steps : int
        Tokens that were chosen or forced.
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
        prompt_text: str = "",
    ) -> None:
        self.choice = choice
        self.steps = 0
        self.tokens = 0
        self.last_token = -1
        self._generation = generation
        self._end_tokens = frozenset(end_tokens)
        seed = generation.seed
        self._sampler = Sampler(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p,
            # The API allows negative seeds, NumPy does not.
            seed=None if seed is None else (seed + choice) % 2**63,
        )
        self._counts: dict[int, int] = {}
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(generation.stop)
        # Of the text that tokens make, without regard to what is held back for a stop string.
        self._offset = 0
        self._opening = prompt_text if generation.echo else ""
        self._forced: deque[int] = deque()
        self._scorer = None
        if generation.logprobs is not None:
            self._scorer = Scorer(tokenizer, generation.logprobs)
        self._first: list[Scored] = []
        if generation.scores_prompt and self._scorer is not None:
            self._forced.extend(prompt[1:])
            self._first.append(self._scorer.first(prompt[0]))
            self._prompt_text = Detokenizer(tokenizer)
            self._offset = len(self._prompt_text.push(prompt[0]))
        else:
            self._offset = len(self._opening)

    def advance(self, logits: np.ndarray) -> Piece:
        """Choose the next token from logits [vocabulary], or take the one that is forced.

        Raises
        ------
        ValueError
            If they are no numbers to choose by.
        """
        if not np.isfinite(logits.max()):
            raise ValueError(f"logits: the greatest is {logits.max()}, expected a finite number")
        text, scored = self._opening, self._first
        self._opening, self._first = "", []
        finish: FinishReason | None = None
        if self._forced:
            scored = [*scored, *self._force(logits)]
        elif self._generation.max_tokens:
            more, finish, scores = self._choose(logits)
            text, scored = text + more, [*scored, *scores]
        if not (self._forced or self._generation.max_tokens):
            finish = "length"
        return Piece(self.choice, text, self.tokens, finish, scored)

    def _force(self, logits: np.ndarray) -> list[Scored]:
        token = self._forced.popleft()
        self._take(token)
        scored = self._score(token, logits)
        self._offset += len(self._prompt_text.push(token))
        return scored

    def _choose(self, logits: np.ndarray) -> tuple[str, FinishReason | None, list[Scored]]:
        token = int(self._sampler.choose(self._penalised(logits)[None])[0])
        self._counts[token] = self._counts.get(token, 0) + 1
        self.tokens += 1
        self._take(token)
        scored = self._score(token, logits)
        finish: FinishReason | None = None
        text = ""
        if token in self._end_tokens:
            finish = "stop"
        else:
            new = self._detokenizer.push(token)
            self._offset += len(new)
            text = self._stops.push(new)
            if self._stops.found:
                finish = "stop"
            elif self.tokens >= self._generation.max_tokens:
                finish = "length"
        if finish is not None:
            text += self._stops.flush()
        return text, finish, scored

    def _take(self, token: int) -> None:
        self.steps += 1
        self.last_token = token

    def _score(self, token: int, logits: np.ndarray) -> list[Scored]:
        return [self._scorer.score(token, logits, self._offset)] if self._scorer else []

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
