"""Choosing tokens from logits, and the loop that goes on with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from less_cache._checks import check_int, check_real

State_contra = TypeVar("State_contra", contravariant=True)


@dataclass
class Sampler:
    """How a token is chosen.

    Parameters
    ----------
    temperature
        Divides the logits; 0 takes the likeliest token, and so does one so small that a quotient
        would overflow.
    top_k
        Only this many of the likeliest; ``None``: all.
    top_p
        Only the likeliest whose probabilities sum up to this, at least one token.
    min_p
        Only tokens that are at least this times as probable as the likeliest; 0: all.
    seed
        Of the random numbers; ``None``: another sequence of them each time.

    Raises
    ------
    TypeError, ValueError
        If a number is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature != 0:
            check_real("temperature", self.temperature, above=0.0)
        if self.top_k is not None:
            check_int("top_k", self.top_k, minimum=1)
        check_real("top_p", self.top_p, above=0.0, maximum=1.0)
        if self.min_p != 0:
            check_real("min_p", self.min_p, above=0.0, maximum=1.0)
        if self.seed is not None:
            check_int("seed", self.seed, minimum=0)
        self._random = np.random.default_rng(self.seed)

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """A token for each row.

        Parameters
        ----------
        logits
            [B, vocabulary].

        Returns
        -------
        numpy.ndarray
            [B] int64.
        """
        if self.temperature == 0:
            return logits.argmax(1)
        order = np.argsort(-logits, axis=1, kind="stable")
        if self.top_k is not None:
            order = order[:, : self.top_k]
        ranked = np.take_along_axis(logits, order, 1).astype(np.float64)
        # Differences first: the likeliest's is 0 at any temperature, where its quotient may be
        # infinite. The others' may become -inf, which weighs nothing.
        with np.errstate(over="ignore"):
            weights = np.exp((ranked - ranked[:, :1]) / self.temperature)
        # The likeliest weighs 1.
        weights = np.where(weights < self.min_p, 0.0, weights)
        weights /= weights.sum(1, keepdims=True)
        # A token stays if those before it do not reach top_p yet: the first always does.
        before = weights.cumsum(1) - weights
        weights = np.where(before < self.top_p, weights, 0.0)
        sums = weights.cumsum(1)
        drawn = self._random.random((len(logits), 1)) * sums[:, -1:]
        column = np.minimum((sums <= drawn).sum(1), weights.shape[1] - 1)
        return order[np.arange(len(order)), column]


@dataclass(frozen=True)
class GenerationStep:
    """What one step of generation gave.

    Attributes
    ----------
    tokens : numpy.ndarray
        [B] int64; the padding token where a sequence had ended before.
    finished : numpy.ndarray
        [B] bool, which sequences have ended, with this token or before.
    """

    tokens: np.ndarray
    finished: np.ndarray


class Appending(Protocol[State_contra]):
    """All that generation asks of a decoder."""

    def append(
        self, state: State_contra, input_ids: np.ndarray, attention_mask: np.ndarray | None
    ) -> np.ndarray:
        """As `BatchDecoder.append`."""


def generate_tokens(
    decoder: Appending[State_contra],
    state: State_contra,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop_tokens: Sequence[int],
    pad_token: int,
) -> Iterator[GenerationStep]:
    """The loop behind `BatchDecoder.stream`; see there. Arguments are checked at once."""
    check_int("max_new_tokens", max_new_tokens, minimum=1)
    stops = np.asarray(list(stop_tokens), dtype=np.int64)

    def steps() -> Iterator[GenerationStep]:
        logits = decoder.append(state, input_ids, attention_mask)
        logits = _last(logits, attention_mask)
        finished = np.zeros(len(input_ids), dtype=bool)
        for remaining in range(max_new_tokens - 1, -1, -1):
            tokens = np.where(finished, pad_token, sampler.choose(logits))
            going_on = ~finished
            finished = finished | np.isin(tokens, stops)
            yield GenerationStep(tokens, finished.copy())
            if not remaining or finished.all():
                return
            # A sequence that has ended takes nothing in, the padding token no more than others.
            going_on &= ~finished
            mask = going_on[:, None].astype(np.int64)
            logits = _last(decoder.append(state, tokens[:, None], mask), mask)

    return steps()


def _last(logits: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[B, vocabulary] of each row's last token, also of a model exported with all logits."""
    if logits.ndim == 2:
        return logits
    if mask is None:
        return logits[:, -1]
    columns = (np.asarray(mask) * np.arange(logits.shape[1])).max(1)
    return logits[np.arange(len(logits)), columns]
