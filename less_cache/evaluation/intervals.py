"""Confidence intervals of means over tokens: documents drawn with replacement.

Tokens of one document are alike, so that documents are what is drawn, with all of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap samples of a confidence interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Parameters
    ----------
    value
        The mean; NaN of nothing.
    low, high
        NaN where there are fewer than two documents to draw.
    """

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends; ``None`` where there is no interval."""
        return None if math.isnan(self.low) else (self.low, self.high)


def drawn_documents(count: int, *, seed: int = 0) -> np.ndarray:
    """How often each document is drawn, [RESAMPLES, count]."""
    return np.random.default_rng(seed).multinomial(count, np.ones(count) / count, size=RESAMPLES)


def estimated_mean(
    documents: Sequence[str], totals: Sequence[float], counts: Sequence[float], *, seed: int = 0
) -> Estimate:
    """The mean of what is counted, with its interval.

    Parameters
    ----------
    documents
        Of each part, the document that it is from.
    totals, counts
        Of each part, the sum of its numbers and how many they are.
    seed
        Of the draws: those of equal seeds and documents are alike.
    """
    sums: dict[str, np.ndarray] = {}
    for document, total, count in zip(documents, totals, counts, strict=True):
        if count:
            sums.setdefault(document, np.zeros(2))[:] += (total, count)
    if not sums:
        return Estimate(math.nan, math.nan, math.nan)
    table = np.array([sums[name] for name in sorted(sums)])
    value = float(table[:, 0].sum() / table[:, 1].sum())
    if len(table) < 2:
        return Estimate(value, math.nan, math.nan)
    drawn = drawn_documents(len(table), seed=seed) @ table
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return Estimate(value, float(low), float(high))
