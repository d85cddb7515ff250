"""The policies that come with the library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .._checks import check_int, check_real
from .base import FAIR_SHARE, Gain, Policy, Start

Array = Any

SINGLE_EPSILON = 2.0**-23
"""float32's: what is smaller than this, beside 1, is nothing."""


class _FixedScore(Policy):
    """A policy whose scores do not depend on any query."""

    gains: ClassVar[Gain] = Gain.NONE

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        return scores, history


@dataclass(frozen=True)
class FullCache(_FixedScore):
    """Keep every pair: exact attention. More than `capacity` tokens are an error."""

    sinks: int = 0
    recent: int | None = 0

    evicts: ClassVar[bool] = False


@dataclass(frozen=True)
class SinkWindow(_FixedScore):
    """The first `sinks` tokens and a sliding window: Λ-mask, LM-Infinite, StreamingLLM.

    Parameters
    ----------
    sinks
        How many of the first tokens are always kept.
    recent
        The window's guaranteed part. Whatever it is, the oldest pair past the sinks leaves first,
        so it changes nothing but the least capacity that is accepted.
    """

    sinks: int = 4
    recent: int | None = 0

    starts: ClassVar[Start] = Start.POSITION

    def initial_scores(self, xp: Any, keys: Array, positions: Array) -> Array:
        return xp.astype(positions, keys.dtype)


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters (arXiv 2306.14048): the pairs with the largest sum of attention so far stay.

    Parameters
    ----------
    recent
        Tokens protected whatever their score. Default: half of the slots besides the current one.
    """

    recent: int | None = None

    gains: ClassVar[Gain] = Gain.SUM

    def default_recent(self, capacity: int) -> int:
        return max((capacity - 1 - self.sinks) // 2, 0)

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        for query in range(probabilities.shape[-2]):
            scores = self.decay * scores + xp.sum(probabilities[..., query, :], axis=-2)
        return scores, history


@dataclass(frozen=True)
class DecayedH2O(H2O):
    """`H2O` that forgets: s ← λ s + p at each new query.

    Parameters
    ----------
    factor
        λ, above 0 and at most 1.
    """

    factor: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("factor", self.factor, above=0.0, maximum=1.0)

    @property
    def decay(self) -> float:
        return self.factor

    @property
    def counted(self) -> int | None:
        # Older queries weigh less than a float32 sum of the others can show.
        if self.factor == 1:
            return None
        return math.ceil(math.log(SINGLE_EPSILON) / math.log(self.factor))


@dataclass(frozen=True)
class ObservationWindow(Policy):
    """SnapKV (arXiv 2404.14469) for a cache that goes on: a call's last queries vote.

    Of a call's S queries the last m = min(S, window) count, a query's vote fading as the next ones
    come, with λ = 1 - 1 / window::

        s ← λ^S s + pool(Σ_{i = 1..m} λ^{m - i} Σ_g p_i)

    where pool is the mean over `neighbours` held pairs in order of position, the pair in the
    middle, and is left out where a call has a single query. A prompt thus needs the probabilities
    of its last queries alone, and a decode step is `DecayedH2O`'s.

    Parameters
    ----------
    recent
        Tokens protected whatever their score. Default: `window`, but at most half of the slots
        besides the current one.
    window
        Queries of a call that count.
    neighbours
        Pairs that a vote is spread over; an odd number, 1 for none.
    """

    recent: int | None = None
    window: int = 32
    neighbours: int = 5

    gains: ClassVar[Gain] = Gain.SUM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_int("neighbours", self.neighbours, minimum=1)
        if self.neighbours % 2 == 0:
            raise ValueError(f"neighbours: got {self.neighbours}, expected an odd number")

    @property
    def decay(self) -> float:
        return 1.0 - 1.0 / self.window

    @property
    def counted(self) -> int | None:
        return self.window

    @property
    def pool(self) -> int:
        return self.neighbours

    def default_recent(self, capacity: int) -> int:
        return min(self.window, max((capacity - 1 - self.sinks) // 2, 0))

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        queries = probabilities.shape[-2]
        gained = xp.zeros_like(scores)
        for query in range(max(0, queries - self.window), queries):
            gained = self.decay * gained + xp.sum(probabilities[..., query, :], axis=-2)
        if queries > 1:
            gained = _pooled(xp, gained, self.neighbours)
        return self.decay**queries * scores + gained, history


@dataclass(frozen=True)
class TOVA(H2O):
    """Token omission via attention (arXiv 2401.06104): the last query's attention decides."""

    recent: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is None or self.recent < 1:
            raise ValueError(
                f"recent: got {self.recent!r}, expected 1 or more: TOVA keeps the current token"
            )

    @property
    def decay(self) -> float:
        return 0.0

    @property
    def counted(self) -> int | None:
        return 1


@dataclass(frozen=True)
class Scissorhands(Policy):
    """Persistence of importance (arXiv 2305.17118): how often a pair had its fair share.

    A pair scores one for each of the last `window` queries at which its probability, averaged over
    the query heads of its group, was at least 1/n, n being the pairs that the query attended over.

    Parameters
    ----------
    recent
        Tokens protected whatever their score. Default: half of the slots besides the current one.
    window
        Queries looked back on, 1 to 62 (the history is one 64-bit word a pair).
    """

    recent: int | None = None
    window: int = 32

    gains: ClassVar[Gain] = Gain.HISTORY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1, maximum=62)

    @property
    def history_window(self) -> int:
        return self.window

    def default_recent(self, capacity: int) -> int:
        return max((capacity - 1 - self.sinks) // 2, 0)

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        for query in range(probabilities.shape[-2]):
            seen = visible[..., query, :]
            share = xp.mean(probabilities[..., query, :], axis=-2)
            attended = xp.sum(xp.astype(seen, scores.dtype), axis=-1, keepdims=True)
            # Multiplied out, so that equal probabilities meet the mean exactly in every precision.
            persistent = (share * attended >= FAIR_SHARE) & seen
            history = (history * 2 + xp.astype(persistent, history.dtype)) % (2**self.window)
        bits = [xp.astype((history // 2**bit) % 2, scores.dtype) for bit in range(self.window)]
        return xp.sum(xp.stack(bits), axis=0), history


@dataclass(frozen=True)
class KeyNorm(_FixedScore):
    """Keys of a small norm attract attention (arXiv 2406.11430): the largest norm leaves first."""

    sinks: int = 0
    recent: int | None = 0

    starts: ClassVar[Start] = Start.KEY_NORM

    def initial_scores(self, xp: Any, keys: Array, positions: Array) -> Array:
        return -xp.sqrt(xp.sum(keys * keys, axis=-1))


def _pooled(xp: Any, gained: Array, neighbours: int) -> Array:
    """The mean over so many neighbours on the last axis; beyond its ends there are zeros."""
    count, reach = gained.shape[-1], neighbours // 2
    nothing = xp.zeros_like(gained[..., :1])
    padded = xp.concat([*([nothing] * reach), gained, *([nothing] * reach)], axis=-1)
    shifted = [padded[..., shift : shift + count] for shift in range(neighbours)]
    return xp.sum(xp.stack(shifted), axis=0) / neighbours
