"""Slots handed out to heads by what each loses with how many."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .._checks import check_int

Curve = Mapping[int, float]
"""Slots -> the loss that a head adds with so many, in nats a token."""


def hand_out(losses: Sequence[Sequence[Curve]], slots: int) -> list[list[int]]:
    """Capacities by head that add the least loss with so many slots in all.

    Each head's points are first made a convex curve, their lower hull: between its corners a head's
    loss is taken to fall in a line. Slots then go, piece by piece, to where one more saves most,
    which on convex curves is the best there is. It takes it that heads' losses add.

    Parameters
    ----------
    losses
        For each layer, for each KV head, its measured points; at least one.
    slots
        Of all heads of all layers together.

    Returns
    -------
    list
        For each layer, for each head, its slots: between its fewest and its most measured ones, and
        in all `slots` exactly, unless every head has its most.

    Raises
    ------
    ValueError
        If a head has no points or a loss that is no number, or `slots` are fewer than the fewest
        measured ones of all heads.
    """
    check_int("slots", slots, minimum=1)
    hulls = [
        [_lower_hull(layer, head, c) for head, c in enumerate(row)]
        for layer, row in enumerate(losses)
    ]
    given = [[hull[0][0] for hull in row] for row in hulls]
    spare = slots - sum(map(sum, given))
    if spare < 0:
        raise ValueError(
            f"slots: got {slots}, expected at least {slots - spare}, the fewest measured"
        )
    # Savings a slot of every head's next piece; steepest first, and then the first head's.
    waiting = [
        (_slope(hull[0], hull[1]), layer, head, 1)
        for layer, row in enumerate(hulls)
        for head, hull in enumerate(row)
        if len(hull) > 1
    ]
    heapq.heapify(waiting)
    while waiting and spare:
        _, layer, head, piece = heapq.heappop(waiting)
        hull = hulls[layer][head]
        taken = min(spare, hull[piece][0] - hull[piece - 1][0])
        given[layer][head] += taken
        spare -= taken
        if piece + 1 < len(hull):
            entry = (_slope(hull[piece], hull[piece + 1]), layer, head, piece + 1)
            heapq.heappush(waiting, entry)
    return given


def predicted_loss(losses: Sequence[Sequence[Curve]], capacities: Sequence[Sequence[int]]) -> float:
    """What such capacities add by the heads' convex curves, in nats a token."""
    return sum(
        _at(_lower_hull(layer, head, curve), capacities[layer][head])
        for layer, row in enumerate(losses)
        for head, curve in enumerate(row)
    )


def _lower_hull(layer: int, head: int, curve: Curve) -> list[tuple[int, float]]:
    """The corners of the largest convex curve below the points, as far as it falls."""
    if not curve:
        raise ValueError(f"losses: layer {layer}, head {head} has no points")
    hull: list[tuple[int, float]] = []
    for point in sorted(curve.items()):
        if not point[1] == point[1]:
            raise ValueError(f"losses: layer {layer}, head {head} has NaN at {point[0]} slots")
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and hull[-1][1] >= hull[-2][1]:
        hull.pop()
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _at(hull: list[tuple[int, float]], slots: int) -> float:
    if slots <= hull[0][0]:
        return hull[0][1]
    for a, b in pairwise(hull):
        if slots <= b[0]:
            return a[1] + _slope(a, b) * (slots - a[0])
    return hull[-1][1]
