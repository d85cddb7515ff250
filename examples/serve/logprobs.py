"""Log probabilities of tokens: of the one that was taken, and of the likeliest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .detokenize import REPLACEMENT, Decodes

LEAST = -9999.0
"""Stands for minus infinity, which JSON has not."""


class Token(NamedTuple):
    """How a token is shown.

    Attributes
    ----------
    text : str
        Its text; of one that is only a part of a character, how the vocabulary writes it.
    whole : bool
        Whether it is its text.
    """

    text: str
    whole: bool


@dataclass(frozen=True)
class Scored:
    """A token, and how probable it was where it stands.

    Attributes
    ----------
    token : Token
        What was taken.
    logprob : float or None
        Natural logarithm of its probability; ``None``: nothing stands before it.
    top : list of (Token, float)
        The likeliest, in order.
    offset : int
        Characters of the answer's text before it.
    """

    token: Token
    logprob: float | None
    top: list[tuple[Token, float]]
    offset: int


class Scorer:
    """Scores tokens by the model's own probabilities: before temperature, penalties and the like.

    Parameters
    ----------
    tokenizer
        Names tokens.
    top
        How many of the likeliest are told.
    """

    def __init__(self, tokenizer: Decodes, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top

    def first(self, token: int) -> Scored:
        """What begins a prompt."""
        return Scored(self._shown(token), None, [], 0)

    def score(self, token: int, logits: np.ndarray, offset: int) -> Scored:
        """Score a token by the logits [vocabulary] that it was taken from."""
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        np.maximum(scores, LEAST, out=scores)
        count = min(self._top, len(scores))
        best = np.argpartition(-scores, count - 1)[:count] if count else np.empty(0, np.int64)
        best = best[np.lexsort((best, -scores[best]))]
        return Scored(
            self._shown(token),
            float(scores[token]),
            [(self._shown(int(i)), float(scores[i])) for i in best],
            offset,
        )

    def _shown(self, token: int) -> Token:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if text and REPLACEMENT not in text:
            return Token(text, True)
        return Token(self._tokenizer.id_to_token(token) or f"token_id:{token}", False)
