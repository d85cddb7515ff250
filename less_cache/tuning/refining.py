"""Curves put right beside small caches: where losses are large they do not add.

A head is measured while all others are full. In a cache where all are small, those that could have
stood in for it are small too, and it may lose twice as much, or, with a state's or another head's
help, half. So the plan itself is measured, with one head's slots changed at a time, and one layer's
codes; each head's curve, and each layer's loss by codes, is multiplied by what was measured over
what was foreseen; and bytes are handed out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from .allocation import Offer, Plan, choose, plan_with

LOOKED_AT = 32
"""Heads that are measured in a round: those that should lose most by half of their slots."""
BOUND = 4.0
"""Of a factor, and its inverse."""
TOLD_APART = 1e-4
"""Nats a token: changes foreseen to be smaller say nothing of a factor."""

STEPS = (1.0, 0.5, 0.25)
"""Parts of the way to new factors that are tried: what is noise in them, a smaller step leaves."""
CODES = -1
"""In a head's place: the layer's codes."""

Measure = Callable[[Plan], float]
"""Nats a token that a whole cache of this plan loses."""


@dataclass(frozen=True)
class Factors:
    """What to multiply losses with.

    Parameters
    ----------
    heads
        Of each KV head of each layer, for its curve.
    codes
        Of each layer, for the loss of its codes.
    """

    heads: list[list[float]]
    codes: list[float]

    @classmethod
    def ones(cls, offers: Sequence[Sequence[Offer]]) -> Factors:
        """No change."""
        return cls([[1.0] * len(row[0].curves) for row in offers], [1.0] * len(offers))

    def towards(self, other: Factors, step: float) -> Factors:
        """Part of the way to others; 1: all of it."""

        def between(ours: list[float], theirs: list[float]) -> list[float]:
            return [a ** (1 - step) * b**step for a, b in zip(ours, theirs, strict=True)]

        heads = [between(*rows) for rows in zip(self.heads, other.heads, strict=True)]
        return Factors(heads, between(self.codes, other.codes))

    def of(self, offers: Sequence[Sequence[Offer]]) -> list[list[Offer]]:
        """The offers of each layer with their losses multiplied."""
        return [
            [
                dataclasses.replace(
                    offer,
                    curves=[
                        {slots: factor * loss for slots, loss in curve.items()}
                        for factor, curve in zip(heads, offer.curves, strict=True)
                    ],
                    coding=offer.coding * codes,
                )
                for offer in row
            ]
            for row, heads, codes in zip(offers, self.heads, self.codes, strict=True)
        ]


def refine(
    offers: Sequence[Sequence[Offer]],
    plan: Plan,
    total: int,
    measure: Measure,
    *,
    rounds: int,
    told: Callable[[int], object] = lambda _: None,
) -> Factors:
    """The factors with which bytes are handed out best, as whole caches lose.

    Parameters
    ----------
    offers
        Of each layer, as measured.
    plan
        What `choose` makes of them.
    total
        Bytes of all layers together.
    measure
        What whole caches lose.
    rounds
        How often to measure around the best plan so far; it ends earlier where nothing is gained.
    told
        Called with 1 after each cache that was measured.

    Returns
    -------
    Factors
        Those of the best plan; ones, if that is the first.
    """
    best = Factors.ones(offers)
    least = measure(plan)
    told(1)
    for _ in range(rounds):
        found = _factors(offers, plan, least, measure, told)
        nearer = [best.towards(found, step) for step in STEPS]
        plans = [choose(factors.of(offers), total) for factors in nearer]
        losses = []
        for tried in plans:
            losses.append(measure(tried))
            told(1)
        if min(losses) >= least:
            break
        least = min(losses)
        taken = losses.index(least)
        best, plan = nearer[taken], plans[taken]
    return best


def trials(offers: Sequence[Sequence[Offer]], rounds: int) -> int:
    """The most caches that `refine` measures."""
    heads = sum(len(row[0].curves) for row in offers)
    return 1 + rounds * (len(STEPS) + min(heads, LOOKED_AT) + len(offers))


def _factors(
    offers: Sequence[Sequence[Offer]],
    plan: Plan,
    loss: float,
    measure: Measure,
    told: Callable[[int], object],
) -> Factors:
    """What was measured around a plan over what the offers foresee.

    What is not measured takes the mean of what is.
    """
    mine = [_alike(row, taken) for row, taken in zip(offers, plan.offers, strict=True)]
    now = plan_with(mine, plan.capacities)
    changes: dict[tuple[int, int], Plan] = {}
    for layer, slots_of in enumerate(plan.capacities):
        for head, held in enumerate(slots_of):
            fewest = mine[layer].hulls[head][0][0]
            slots = held // 2 if held // 2 >= fewest else 2 * held
            capacities = [list(own) for own in plan.capacities]
            capacities[layer][head] = slots
            changes[layer, head] = plan_with(mine, capacities)
    most = sorted(changes, key=lambda place: -abs(changes[place].loss - now.loss))
    changes = {place: changes[place] for place in most[:LOOKED_AT]}
    for layer, row in enumerate(offers):
        other = _next_codes(row, mine[layer])
        if other is not None:
            built = [*mine[:layer], other, *mine[layer + 1 :]]
            changes[layer, CODES] = plan_with(built, plan.capacities)
    found = {}
    for place, changed in changes.items():
        foreseen = changed.loss - now.loss
        if abs(foreseen) >= TOLD_APART:
            ratio = (measure(changed) - loss) / foreseen
            found[place] = min(max(ratio, 1 / BOUND), BOUND)
        told(1)
    mean = geometric_mean(found.values()) if found else 1.0
    heads = [
        [found.get((layer, head), mean) for head in range(len(slots_of))]
        for layer, slots_of in enumerate(plan.capacities)
    ]
    codes = [found.get((layer, CODES), mean) for layer in range(len(offers))]
    return Factors(heads, codes)


def _alike(row: Sequence[Offer], taken: Offer) -> Offer:
    """The offer of a row that is built as `taken` is, whose losses may have been multiplied."""
    return next(
        offer
        for offer in row
        if (offer.policy, offer.quantization, offer.rank)
        == (taken.policy, taken.quantization, taken.rank)
    )


def _next_codes(row: Sequence[Offer], own: Offer) -> Offer | None:
    """The same with the next fewer bytes a slot, or the next more where it has the fewest."""
    alike = [
        offer
        for offer in row
        if (offer.policy, offer.rank) == (own.policy, own.rank)
        and offer.slot_bytes != own.slot_bytes
    ]
    fewer = [offer for offer in alike if offer.slot_bytes < own.slot_bytes]
    if fewer:
        return max(fewer, key=lambda offer: (offer.slot_bytes, -offer.coding))
    return min(alike, key=lambda offer: (offer.slot_bytes, offer.coding), default=None)
