"""From what was measured to the ways in which a layer can be built, and from a plan to a config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..config import CacheConfig
from ..policies import Policy
from ..quantization import Quantization
from ..quantization.settings import EIGHTHS
from .allocation import Offer, Plan
from .bases import AVERAGES
from .measuring import LayerLosses

BETWEEN = 3
"""Points put between two measured ones."""

StateCurves = Mapping[tuple[Policy, int], Sequence[Mapping[int, float]]]
"""(policy, rank) -> for each KV head, slots -> loss with the state."""


def offers_of(
    config: CacheConfig,
    layer: int,
    losses: LayerLosses,
    states: StateCurves | None = None,
) -> list[Offer]:
    """Every measured way to build a layer.

    Parameters
    ----------
    config
        The model's shapes.
    layer
        Which.
    losses
        Of the layer. Losses of evicting and of coding are taken to add.
    states
        What low-rank states make of it.
    """
    found = []
    for codes, coding in _worth_trying(config, layer, losses):
        for policy, curves in losses.evicting.items():
            found.append(_offer(config, layer, policy, codes, 0, curves, coding))
        for (policy, rank), few in (states or {}).items():
            # With all slots there is nothing in a state.
            whole = [
                {**curve, max(alone): 0.0}
                for curve, alone in zip(few, losses.evicting[policy], strict=True)
            ]
            found.append(_offer(config, layer, policy, codes, rank, whole, coding))
    return found


def _worth_trying(
    config: CacheConfig, layer: int, losses: LayerLosses
) -> list[tuple[Quantization | None, float]]:
    """Ways to code with what they lose, most bytes first: each loses more than those before."""
    ways: list[tuple[Quantization | None, float]] = [(None, 0.0)]
    for key_bits, key_loss in losses.keys.items():
        for value_bits, value_loss in losses.values.items():
            way = Quantization(key_bits, value_bits, "calibrated")
            ways.append((way, max(key_loss, 0.0) + max(value_loss, 0.0)))
    plain = config.replace(rank=0, dtype="float16")
    sizes = {codes: plain.replace(quantization=codes).layer(layer).slot_bytes for codes, _ in ways}
    found: list[tuple[Quantization | None, float]] = []
    # From the fewest bytes on: more bytes must buy a smaller loss.
    for codes, loss in sorted(ways, key=lambda way: (sizes[way[0]], way[1])):
        if not found or loss < found[-1][1]:
            found.append((codes, loss))
    return found[::-1]


def _offer(
    config: CacheConfig,
    layer: int,
    policy: Policy,
    codes: Quantization | None,
    rank: int,
    curves: Sequence[Mapping[int, float]],
    coding: float,
) -> Offer:
    slots = max(min(curve) for curve in curves)
    shaped = config.replace(
        capacity=slots, policy=policy, rank=rank, quantization=codes, dtype="float16"
    )
    spec = shaped.layer(layer)
    return Offer(
        policy=policy,
        quantization=codes,
        rank=rank,
        curves=[smooth(curve) for curve in curves],
        slot_bytes=spec.slot_bytes,
        fixed_bytes=spec.fixed_bytes,
        coding=coding,
    )


def least_bytes(config: CacheConfig, policies: Sequence[Policy], slots: int) -> int:
    """What so many slots for every head take in the fewest bits that are tried."""
    bits = (round(min(AVERAGES)),) * EIGHTHS
    codes = Quantization(bits, bits, "calibrated")
    return min(
        config.replace(
            capacity=max(slots, policy.sinks + (policy.recent or 0) + 1),
            policy=policy,
            quantization=codes,
            rank=0,
        ).bytes_per_sequence()
        for policy in policies
    )


def config_of(config: CacheConfig, plan: Plan) -> CacheConfig:
    """The cache that a plan describes."""
    return config.replace(
        capacity=plan.capacities,
        policy=[offer.policy for offer in plan.offers],
        rank=[offer.rank for offer in plan.offers],
        quantization=[offer.quantization for offer in plan.offers],
        hidden=None,
    )


def smooth(curve: Mapping[int, float]) -> dict[int, float]:
    """A head's curve with points between those measured, as losses fall: by powers of the slots."""
    points = sorted((slots, max(loss, 0.0)) for slots, loss in curve.items())
    found = dict(points)
    for (a, high), (b, low) in pairwise(points):
        if not high > low > 0:
            continue
        power = math.log(low / high) / math.log(b / a)
        for part in range(1, BETWEEN + 1):
            slots = round(a * (b / a) ** (part / (BETWEEN + 1)))
            if a < slots < b:
                found[slots] = high * (slots / a) ** power
    return found
