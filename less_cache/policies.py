"""Eviction policies: data that says how a pair earns its place in the cache, and what is protected.

A policy holds no tensors. Which pair leaves is the same rule for all of them: of the unprotected
pairs, the one with the least (score, position). A policy only decides what the score is.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ._checks import check_int, check_real

Array = Any


class Score(enum.IntEnum):
    """What a score is made of; every backend switches on this, not on the policy's class."""

    CUSTOM = -1
    """Anything a subclass computes in `Policy.update`; the reference backend alone runs it."""
    NONE = 0
    """Nothing is evicted, no score is kept."""
    POSITION = 1
    """The pair's position: the oldest pair leaves first."""
    KEY_NORM = 2
    """Minus the key's Euclidean norm, fixed when the pair is inserted."""
    ATTENTION = 3
    """A sum of attention probabilities, multiplied by `Policy.decay` at each new query."""
    HISTORY = 4
    """In how many of the last `Policy.window` queries the pair had at least its fair share."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies. A subclass of your own runs on the reference backend.

    Override `initial_scores` and `update`; both work on one sequence and one KV head at a time,
    with arrays of any array-API library.

    Parameters
    ----------
    sinks
        Pairs at positions below this are never evicted.
    recent
        This many of the last tokens seen before the incoming one are never evicted.
        ``None`` lets the policy choose for the capacity at hand (see `resolve`).
    """

    sinks: int = 0
    recent: int | None = 0

    score: ClassVar[Score] = Score.CUSTOM

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, minimum=0)
        if self.recent is not None:
            check_int("recent", self.recent, minimum=0)

    @property
    def decay(self) -> float:
        """Factor on an `ATTENTION` score at each new query, in [0, 1]."""
        return 1.0

    @property
    def history_window(self) -> int:
        """Queries that a `HISTORY` score looks back on; 0 where the policy keeps no history."""
        return 0

    def default_recent(self, capacity: int) -> int:
        """How many recent tokens to protect at this capacity where the user named no number."""
        return max(capacity - 1 - self.sinks, 0)

    def resolve(self, capacity: int) -> Policy:
        """Fill in every number for `capacity` slots.

        Raises
        ------
        ValueError
            If `capacity` leaves no slot that may be evicted besides the current token's:
            it must be at least ``sinks + recent + 1``.
        """
        policy = self
        if self.recent is None:
            policy = dataclasses.replace(self, recent=self.default_recent(capacity))
        needed = policy.sinks + policy.protected_recent + 1
        if capacity < needed:
            raise ValueError(
                f"capacity: got {capacity}, but {policy} needs at least sinks + recent + 1 "
                f"= {needed} slots"
            )
        return policy

    @property
    def protected_recent(self) -> int:
        """`recent` as a number; only a resolved policy has one."""
        if self.recent is None:
            raise ValueError(f"recent: {self} is not resolved; call policy.resolve(capacity) first")
        return self.recent

    def initial_scores(self, xp: Any, keys: Array, positions: Array) -> Array:
        """Scores that new pairs start from, before any query has seen them.

        Parameters
        ----------
        xp
            The array-API namespace of the arrays.
        keys
            [S, D], after the rotary embedding.
        positions
            [S], integers.

        Returns
        -------
        Array
            [S], of the keys' dtype.
        """
        return xp.zeros_like(keys[:, 0])

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        """Scores and history after S new queries have attended over N pairs.

        Parameters
        ----------
        xp
            The array-API namespace of the arrays.
        scores
            [N], the kept pairs' scores, then `initial_scores` of the new ones.
        history
            [N] int64, zero for new pairs; a policy may keep 62 bits a pair in it.
            It is stored only where `history_window` is above 0.
        probabilities
            [G, S, N], the softmax of each query head over the pairs alone; 0 where not visible.
        visible
            [S, N], which pairs each query attended over.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update()")

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON-ready data; `policy_from_dict` reads it back."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}


class _FixedScore(Policy):
    """A policy whose scores do not depend on any query."""

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        return scores, history


@dataclass(frozen=True)
class FullCache(_FixedScore):
    """Keep every pair: exact attention. More than `capacity` tokens are an error."""

    sinks: int = 0
    recent: int | None = 0

    score: ClassVar[Score] = Score.NONE


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

    score: ClassVar[Score] = Score.POSITION

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

    score: ClassVar[Score] = Score.ATTENTION

    def default_recent(self, capacity: int) -> int:
        return max((capacity - 1 - self.sinks) // 2, 0)

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        for query in range(probabilities.shape[1]):
            scores = self.decay * scores + xp.sum(probabilities[:, query], axis=0)
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

    score: ClassVar[Score] = Score.HISTORY

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
        for query in range(probabilities.shape[1]):
            share = xp.mean(probabilities[:, query], axis=0)
            attended = xp.sum(xp.astype(visible[query], scores.dtype))
            # Multiplied out, so that equal probabilities meet the mean exactly in every precision.
            persistent = (share * attended >= 1.0 - 1e-6) & visible[query]
            history = (history * 2 + xp.astype(persistent, history.dtype)) % (2**self.window)
        bits = [xp.astype((history // 2**bit) % 2, scores.dtype) for bit in range(self.window)]
        return xp.sum(xp.stack(bits), axis=0), history


@dataclass(frozen=True)
class KeyNorm(_FixedScore):
    """Keys of a small norm attract attention (arXiv 2406.11430): the largest norm leaves first."""

    sinks: int = 0
    recent: int | None = 0

    score: ClassVar[Score] = Score.KEY_NORM

    def initial_scores(self, xp: Any, keys: Array, positions: Array) -> Array:
        return -xp.sqrt(xp.sum(keys * keys, axis=-1))


POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy
    for policy in (FullCache, SinkWindow, H2O, DecayedH2O, TOVA, Scissorhands, KeyNorm)
}


def policy_from_dict(data: dict[str, Any]) -> Policy:
    """Read a policy of the table back from `Policy.to_dict`'s data.

    Raises
    ------
    ValueError
        If the name is none of the table's, or a field does not belong to that policy.
    """
    fields = dict(data)
    name = fields.pop("name", None)
    if name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(POLICIES)}")
    known = {field.name for field in dataclasses.fields(POLICIES[name])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"policy {name}: unknown field(s) {unknown}, expected some of {sorted(known)}"
        )
    return POLICIES[name](**fields)


def parse_policy(text: str) -> Policy:
    """A policy from its command-line spelling: ``h2o``, ``sinkwindow:sinks=4``, ``tova``.

    Raises
    ------
    ValueError
        If the name or a field is unknown, or a value is not a number.
    """
    name, _, arguments = text.partition(":")
    wanted = name.strip().lower().replace("_", "").replace("-", "")
    by_lower = {known.lower(): known for known in POLICIES}
    if wanted not in by_lower:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(by_lower)}")
    fields: dict[str, Any] = {"name": by_lower[wanted]}
    for item in filter(None, arguments.split(",")):
        key, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"policy {name}: {item!r} is not of the form field=number") from None
        if not math.isfinite(number):
            raise ValueError(f"policy {name}: {item!r} is not a finite number")
        whole = number.is_integer() and key.strip() != "factor"
        fields[key.strip()] = int(number) if whole else number
    return policy_from_dict(fields)
