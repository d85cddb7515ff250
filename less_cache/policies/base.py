"""`Policy`, and the two tables that every backend reads of it."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .._checks import check_int

Array = Any

FAIR_SHARE = 1.0 - 1e-6
"""A pair has its fair share of n if n times its probability reaches this: 1, less rounding."""


class Start(enum.IntEnum):
    """The score that a pair starts with."""

    ZERO = 0
    POSITION = 1
    """Its position: the oldest pair leaves first."""
    KEY_NORM = 2
    """Minus its key's Euclidean norm."""
    GIVEN = 3
    """Whatever the policy's own `Policy.initial_scores` computes."""


class Gain(enum.IntEnum):
    """What a pair's score gains from the queries that see it."""

    NONE = 0
    """Nothing: the score stays what it was."""
    SUM = 1
    """The sum of its probabilities, multiplied by `Policy.decay` at each new query; of one call's
    queries only the last `Policy.counted`, spread over `Policy.pool` neighbours."""
    HISTORY = 2
    """In how many of the last `Policy.history_window` queries it had at least its fair share."""
    GIVEN = 3
    """Whatever the policy's own `Policy.update` computes."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies.

    A subclass of your own overrides `initial_scores`, `update` or both. With ``vectorised = True``
    it runs at full speed on the torch backend, trains and evaluates; otherwise the reference
    backend runs it, one head of one sequence at a time.

    Parameters
    ----------
    sinks
        Pairs at positions below this are never evicted.
    recent
        This many of the last tokens seen before the incoming one are never evicted.
        ``None`` lets the policy choose for the capacity at hand (see `resolve`).

    Examples
    --------
    >>> import less_cache as lc
    >>> class LargestValueOfP(lc.Policy):
    ...     '''Keep the pairs that one query at least has looked at hard.'''
    ...     vectorised = True
    ...     def update(self, xp, scores, history, probabilities, visible):
    ...         return xp.maximum(scores, xp.max(probabilities, axis=(-3, -2))), history
    >>> lc.CacheConfig(2, 4, 2, 8, capacity=16, policy=LargestValueOfP(), rank=0).policy.gains.name
    'GIVEN'
    """

    sinks: int = 0
    recent: int | None = 0

    starts: ClassVar[Start] = Start.ZERO
    gains: ClassVar[Gain] = Gain.GIVEN
    evicts: ClassVar[bool] = True
    """Whether pairs leave at all."""
    vectorised: ClassVar[bool] = False
    """Whether `initial_scores` and `update` take arrays with further axes in front, in torch."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # Who overrides a function without naming its table entry means the function.
        own = vars(cls)
        if "update" in own and "gains" not in own:
            cls.gains = Gain.GIVEN
        if "initial_scores" in own and "starts" not in own:
            cls.starts = Start.GIVEN

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, minimum=0)
        if self.recent is not None:
            check_int("recent", self.recent, minimum=0)
        # NumPy's numbers would be no JSON.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.number):
                object.__setattr__(self, field.name, value.item())

    @property
    def custom(self) -> bool:
        """Whether Python code of a user's own makes the scores."""
        return self.starts is Start.GIVEN or self.gains is Gain.GIVEN

    @property
    def by_age(self) -> bool:
        """Whether scores only say which pair is older: positions tell them, for good."""
        return self.gains is Gain.NONE and self.starts in (Start.ZERO, Start.POSITION)

    @property
    def decay(self) -> float:
        """Factor on a `Gain.SUM` score at each new query, in [0, 1]."""
        return 1.0

    @property
    def counted(self) -> int | None:
        """How many of a call's last queries add to a `Gain.SUM` score; ``None``: all of them."""
        return None

    @property
    def pool(self) -> int:
        """Over how many neighbours, an odd number, a call of several queries spreads its gain."""
        return 1

    @property
    def history_window(self) -> int:
        """Queries that a `Gain.HISTORY` score looks back on; 0 where there is no history."""
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
            [..., S, D], after the rotary embedding.
        positions
            [..., S], integers.

        Returns
        -------
        Array
            [..., S], of the keys' dtype.
        """
        return xp.zeros_like(keys[..., 0])

    def update(
        self, xp: Any, scores: Array, history: Array, probabilities: Array, visible: Array
    ) -> tuple[Array, Array]:
        """Scores and history after S new queries have attended over N pairs.

        The reference calls it once for a call's queries; the torch backend, where the policy is
        `vectorised`, for blocks of them in order. Both must come to the same.

        Parameters
        ----------
        xp
            The array-API namespace of the arrays.
        scores
            [..., N], the kept pairs' scores, then `initial_scores` of the new ones.
        history
            [..., N] int64, zero for new pairs; a policy may keep 62 bits a pair in it.
            It is stored only where `history_window` is above 0.
        probabilities
            [..., G, S, N], the softmax of each query head over the pairs alone; 0 where not
            visible.
        visible
            [..., S, N], which pairs each query attended over.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update()")

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON-ready data; `policy_from_dict` reads a registered one back."""
        return {"name": type(self).__name__, **dataclasses.asdict(self)}
