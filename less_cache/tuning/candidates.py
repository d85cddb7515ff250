"""What a tuned cache is judged beside: plans with a part left out, and caches of equal slots."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..config import CacheConfig
from ..evaluation.perplexity import Contestant
from ..policies import H2O, DecayedH2O, Policy, SinkWindow
from ..quantization import Quantization
from .allocation import Offer, Plan, choose, plan_with

SIMPLE: tuple[tuple[str, Policy, Quantization | None], ...] = (
    ("H2O", H2O(), None),
    ("DecayedH2O", DecayedH2O(factor=0.99), None),
    ("sinks", SinkWindow(4), None),
    ("sinks, 4 bits", SinkWindow(4), Quantization(4, 4, "hadamard")),
    ("sinks, 3 bits", SinkWindow(4), Quantization(3, 3, "hadamard")),
)
"""Caches of equal slots, which need neither text nor tuning."""


def simple_caches(config: CacheConfig, total: int) -> list[Contestant]:
    """Caches of as many equal slots as the bytes hold, pairs counted in 16 bits or as codes.

    Those that the bytes do not hold at all are left out.

    Parameters
    ----------
    config
        The model's shapes.
    total
        Bytes of a sequence.
    """
    found = []
    for name, policy, codes in SIMPLE:
        shaped = config.replace(policy=policy, quantization=codes, rank=0, dtype="float16")
        try:
            slots = equal_slots(shaped, total)
            own = config.replace(capacity=slots, policy=policy, quantization=codes, rank=0)
        except ValueError:
            continue
        found.append(Contestant(name, own))
    return found


def equal_slots(config: CacheConfig, total: int) -> int:
    """The most slots, alike in all heads, that so many bytes hold with this config."""
    fixed = sum(layer.fixed_bytes for layer in config.layers)
    each = sum(layer.kv_heads * layer.slot_bytes for layer in config.layers)
    return max(0, total - fixed) // each


def ablations(offers: Sequence[Sequence[Offer]], best: Plan, total: int) -> dict[str, Plan]:
    """The plan without states, with each other part left out as well; by what is left out.

    Parameters
    ----------
    offers
        Of each layer, without states.
    best
        The plan that was chosen from them.
    total
        Bytes of a sequence.
    """
    found: dict[str, Plan] = {}

    uncoded = [[offer for offer in row if offer.quantization is None] for row in offers]
    with contextlib.suppress(ValueError):
        found["no codes"] = choose(uncoded, total)
    if len({offer.policy for offer in best.offers}) > 1:
        plans = []
        for policy in dict.fromkeys(offer.policy for row in offers for offer in row):
            rows = [[offer for offer in row if offer.policy == policy] for row in offers]
            with contextlib.suppress(ValueError):
                plans.append(choose(rows, total))
        found["one policy"] = min(plans, key=lambda plan: plan.loss)
    found["equal slots"] = _equal(offers, total)
    return found


def _equal(offers: Sequence[Sequence[Offer]], total: int) -> Plan:
    """The best plan whose heads all have equally many slots.

    For each number of slots layers begin with the fewest bytes and take the offers that save most
    for theirs, one by one.
    """
    best: Plan | None = None
    counts = {slots for row in offers for offer in row for hull in offer.hulls for slots, _ in hull}
    for slots in sorted(counts):
        now = [min(row, key=lambda offer: offer.slot_bytes) for row in offers]
        while True:
            plan = _with(now, slots)
            if plan.nbytes > total:
                break
            if best is None or plan.loss < best.loss:
                best = plan
            tried = [
                (_with([*now[:layer], offer, *now[layer + 1 :]], slots), layer, offer)
                for layer, row in enumerate(offers)
                for offer in row
                if offer.slot_bytes > now[layer].slot_bytes
            ]
            steps = [
                ((plan.loss - other.loss) / (other.nbytes - plan.nbytes), layer, offer)
                for other, layer, offer in tried
                if other.nbytes <= total and other.loss < plan.loss
            ]
            if not steps:
                break
            _, layer, offer = max(steps, key=lambda step: step[0])
            now[layer] = offer
    if best is None:
        raise ValueError(f"total: got {total}, too few bytes for equal slots")
    spare = (total - best.nbytes) // sum(
        offer.slot_bytes * len(offer.curves) for offer in best.offers
    )
    return _with(best.offers, best.capacities[0][0] + spare)


def _with(offers: Sequence[Offer], slots: int) -> Plan:
    """So many slots for every head."""
    return plan_with(offers, [[slots] * len(offer.curves) for offer in offers])
