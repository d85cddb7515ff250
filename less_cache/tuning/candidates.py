"""What a tuned cache is judged beside: plans with a part left out, and caches of equal slots."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from ..config import CacheConfig
from ..evaluation.perplexity import Contestant
from ..policies import H2O, DecayedH2O, Policy, SinkWindow
from ..quantization import Quantization
from .allocation import Offer, Plan, choose

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
    fixed = sum(
        layer.bytes_per_sequence - layer.slots * layer.slot_bytes for layer in config.layers
    )
    each = sum(layer.kv_heads * layer.slot_bytes for layer in config.layers)
    return max(0, total - fixed) // each


def ablations(
    offers: Sequence[Sequence[Offer]], best: Plan, config: CacheConfig, total: int
) -> dict[str, Plan]:
    """The plan without states, with each other part left out as well; by what is left out.

    Parameters
    ----------
    offers
        Of each layer, without states.
    best
        The plan that was chosen from them.
    config
        The model's shapes.
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
    found["equal slots"] = _equal(best, config, total)
    return found


def _equal(plan: Plan, config: CacheConfig, total: int) -> Plan:
    """The plan's ways, with as many slots for every head."""
    spare = total - dataclasses.replace(plan, capacities=[[0]] * len(plan.offers)).nbytes
    each = sum(offer.slot_bytes * config.kv_heads for offer in plan.offers)
    slots = spare // each
    return Plan(plan.offers, [[slots] * config.kv_heads for _ in plan.offers], float("nan"))
