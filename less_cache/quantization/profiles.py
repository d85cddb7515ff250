"""Bits of each eighth of a head's channels, handed out to where the error falls most."""

from __future__ import annotations

from torch import Tensor

from .settings import CHANNEL_BITS, EIGHTHS

ERRORS = {0: 1.0, 1: 0.363380, 2: 0.118845, 3: 0.037440, 4: 0.011543, 6: 0.001042, 8: 0.000086}
"""Mean squared error of the best uniform quantiser for N(0, 1), by bits."""


def profile_for(variances: Tensor, average: float) -> tuple[int, ...]:
    """The bits of each eighth of the channels with the least error, so many on average.

    Parameters
    ----------
    variances
        [heads, D] of the inner channels, in descending order; heads count by their own sums, so
        that none outweighs the others.
    average
        Bits a number; rounded down to a whole number of bits for all eighths together.

    Returns
    -------
    tuple
        As `Quantization.key_bits` takes it.
    """
    shares = (variances / variances.sum(1, keepdim=True)).mean(0)
    parts = [float(part.sum()) for part in shares.tensor_split(EIGHTHS)]
    bits = [0] * EIGHTHS
    spare = int(average * EIGHTHS + 1e-9)
    while True:
        best, gain, chosen = None, 0.0, 0
        for eighth, (now, weight) in enumerate(zip(bits, parts, strict=True)):
            for more in CHANNEL_BITS:
                cost = more - now
                if 0 < cost <= spare:
                    saved = weight * (ERRORS[now] - ERRORS[more]) / cost
                    if saved > gain:
                        best, gain, chosen = eighth, saved, more
        if best is None:
            break
        spare -= chosen - bits[best]
        bits[best] = chosen
    # Channels come in descending order, and so do their bits but for ties.
    return tuple(sorted(bits, reverse=True))
