"""Bytes handed out to heads, and ways to build a layer chosen, by what each loses."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .._checks import check_int
from ..policies import Policy
from ..quantization import Quantization

Curve = Mapping[int, float]
"""Slots -> the loss that a head adds with so many, in nats a token."""
SWEEPS = 8
STARTS = 4
"""From the first offers of all layers to the last."""


@dataclass(frozen=True)
class Offer:
    """One way to build a layer, with what it costs and loses.

    Parameters
    ----------
    policy, quantization, rank
        As of `CacheConfig`, for this layer.
    curves
        Of each KV head.
    slot_bytes
        Of one slot of one head.
    fixed_bytes
        Of the layer, whatever its slots: its low-rank state.
    coding
        Loss of the layer's codes, whatever its slots.
    """

    policy: Policy
    quantization: Quantization | None
    rank: int
    curves: Sequence[Curve]
    slot_bytes: int
    fixed_bytes: int = 0
    coding: float = 0.0

    @cached_property
    def hulls(self) -> list[list[tuple[int, float]]]:
        """Of each head, the corners of the largest convex curve below its points."""
        return [lower_hull(f"head {head}", curve) for head, curve in enumerate(self.curves)]


@dataclass(frozen=True)
class Plan:
    """A way for every layer, and its heads' slots.

    Parameters
    ----------
    offers
        The one taken for each layer.
    capacities
        Slots of each head of each layer.
    loss
        What they add by the curves, in nats a token.
    """

    offers: Sequence[Offer]
    capacities: list[list[int]]
    loss: float

    @property
    def nbytes(self) -> int:
        """All bytes of a sequence but each layer's length."""
        return sum(
            offer.fixed_bytes + offer.slot_bytes * sum(slots)
            for offer, slots in zip(self.offers, self.capacities, strict=True)
        )


def hand_out(offers: Sequence[Offer], total: int) -> Plan:
    """Slots by head that add the least loss with so many bytes in all.

    Each head's points are first made a convex curve, their lower hull: between its corners a head's
    loss is taken to fall in a line. Bytes then go, piece by piece, to where one more saves most,
    which on convex curves is the best there is but for a slot. It takes it that heads' losses add.

    Parameters
    ----------
    offers
        How each layer is built.
    total
        Bytes of all layers together.

    Returns
    -------
    Plan
        Every head has between its fewest and its most measured slots.

    Raises
    ------
    ValueError
        If a head has no points or a loss that is no number, or `total` is less than the fewest
        measured slots of all heads take.
    """
    check_int("total", total, minimum=1)
    hulls = [offer.hulls for offer in offers]
    given = [[hull[0][0] for hull in row] for row in hulls]
    spare = total - Plan(offers, given, 0.0).nbytes
    if spare < 0:
        raise ValueError(f"total: got {total}, expected at least {total - spare} bytes")
    # Savings a byte of every head's next piece; steepest first, and then the first head's.
    waiting = [
        (_slope(hull[0], hull[1]) / offers[layer].slot_bytes, layer, head, 1)
        for layer, row in enumerate(hulls)
        for head, hull in enumerate(row)
        if len(hull) > 1
    ]
    heapq.heapify(waiting)
    while waiting:
        _, layer, head, piece = heapq.heappop(waiting)
        hull, cost = hulls[layer][head], offers[layer].slot_bytes
        wanted = hull[piece][0] - hull[piece - 1][0]
        taken = min(spare // cost, wanted)
        given[layer][head] += taken
        spare -= taken * cost
        if taken == wanted and piece + 1 < len(hull):
            slope = _slope(hull[piece], hull[piece + 1]) / cost
            heapq.heappush(waiting, (slope, layer, head, piece + 1))
    return plan_with(offers, given)


def plan_with(offers: Sequence[Offer], capacities: list[list[int]]) -> Plan:
    """Layers built so, with so many slots, and what they lose by the curves."""
    loss = sum(offer.coding for offer in offers)
    for offer, slots in zip(offers, capacities, strict=True):
        loss += sum(map(loss_at, offer.hulls, slots))
    return Plan(offers, capacities, loss)


def choose(offers: Sequence[Sequence[Offer]], total: int) -> Plan:
    """A way for each layer and slots for each head that add the least loss for so many bytes.

    Layers change their way one at a time while that helps, from several starts in which all layers
    take the offer of one place in their lists; the best end is taken.

    Parameters
    ----------
    offers
        Of each layer; the same places in all lists hold ways that are alike.
    total
        Bytes of all layers together.

    Raises
    ------
    ValueError
        As of `hand_out`, if no start fits into the bytes.
    """
    best: Plan | None = None
    for start in range(STARTS):
        share = start / (STARTS - 1)
        now = [row[round(share * (len(row) - 1))] for row in offers]
        plan = _plan_or_none(now, total)
        for _ in range(SWEEPS):
            before = math.inf if plan is None else plan.loss
            for layer, row in enumerate(offers):
                for offer in row:
                    tried = _plan_or_none([*now[:layer], offer, *now[layer + 1 :]], total)
                    if tried is not None and (plan is None or tried.loss < plan.loss):
                        plan, now = tried, list(tried.offers)
            if plan is None or plan.loss >= before:
                break
        if plan is not None and (best is None or plan.loss < best.loss):
            best = plan
    if best is None:
        return hand_out([row[0] for row in offers], total)
    return best


def _plan_or_none(offers: Sequence[Offer], total: int) -> Plan | None:
    fewest = [[hull[0][0] for hull in offer.hulls] for offer in offers]
    return hand_out(offers, total) if Plan(offers, fewest, 0.0).nbytes <= total else None


def lower_hull(name: str, curve: Curve) -> list[tuple[int, float]]:
    """The corners of the largest convex curve below the points, as far as it falls.

    Raises
    ------
    ValueError
        If there are no points, or one is no number.
    """
    if not curve:
        raise ValueError(f"curves: {name} has no points")
    hull: list[tuple[int, float]] = []
    for point in sorted(curve.items()):
        if math.isnan(point[1]):
            raise ValueError(f"curves: {name} has NaN at {point[0]} slots")
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and hull[-1][1] >= hull[-2][1]:
        hull.pop()
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def loss_at(hull: list[tuple[int, float]], slots: int) -> float:
    """A convex curve's loss with so many slots: in a line between its corners."""
    if slots <= hull[0][0]:
        return hull[0][1]
    for a, b in pairwise(hull):
        if slots <= b[0]:
            return a[1] + _slope(a, b) * (slots - a[0])
    return hull[-1][1]
