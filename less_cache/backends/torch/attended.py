"""What attention over the slots gives back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attended(NamedTuple):
    """What queries find among the pairs of their rows.

    Attributes
    ----------
    mean
        [B, heads, G, D], Σ p v.
    probabilities
        [B, heads, G, C]; where heads differ in capacity, [B, 1, G, N].
    log_mass
        [B, heads, G, 1], log Σ exp(logit); ``None`` where it is not wanted.
    """

    mean: Tensor
    probabilities: Tensor
    log_mass: Tensor | None
