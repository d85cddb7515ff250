"""Policies of a user's own."""

from __future__ import annotations

import dataclasses

import less_cache as lc


@dataclasses.dataclass(frozen=True)
class MostSeen(lc.Policy):
    """The pairs that the largest single probability ever fell on stay."""

    recent: int | None = 1
    vectorised = True

    def update(self, xp, scores, history, probabilities, visible):
        return xp.maximum(scores, xp.max(probabilities, axis=(-3, -2))), history


@dataclasses.dataclass(frozen=True)
class Oldest(lc.Policy):
    """The oldest pair leaves, as all scores are alike."""

    recent: int | None = 1
    gains = lc.policies.Gain.NONE

    def update(self, xp, scores, history, probabilities, visible):
        return scores, history


@dataclasses.dataclass(frozen=True)
class MostSeenOneByOne(lc.Policy):
    """The same rule, which takes one head of one sequence at a time."""

    recent: int | None = 1

    def update(self, xp, scores, history, probabilities, visible):
        assert scores.ndim == 1
        return xp.maximum(scores, xp.max(probabilities, axis=(0, 1))), history
