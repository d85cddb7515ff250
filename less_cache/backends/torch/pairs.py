"""Attention of one new token's queries over the pairs in their slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...layer_config import LayerConfig
from .maths import log_mass_of, scaled
from .slots import RunSlots


class Attended(NamedTuple):
    """What queries find among the pairs of their rows.

    Attributes
    ----------
    mean
        [B, heads, G, D], Σ p v.
    probabilities
        [B, heads, G, C].
    log_mass
        [B, heads, G, 1], log Σ exp(logit); ``None`` where it is not wanted.
    """

    mean: Tensor
    probabilities: Tensor
    log_mass: Tensor | None


def attend_pairs(
    layer: LayerConfig,
    slots: RunSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    with_mass: bool,
) -> Attended:
    """Attend over what is stored; the pair that came with the queries is read as it came.

    Parameters
    ----------
    layer, slots
        Of heads of equal capacity.
    q
        [B, heads, G, D].
    k, v
        [B, heads, 1, D], the queries' own pair.
    slot
        [B, heads, 1] int64, where it lies.
    with_mass
        Whether `log_mass` is wanted.
    """
    products = slots.products(q)
    if layer.key_layout is not None:
        own = q.to(slots.wide) @ k.to(slots.wide).transpose(2, 3)
        products.scatter_(3, slot.unsqueeze(2).expand_as(own), own)
    logits = scaled(layer, products)
    # Empty slots have position -1: they get the lowest number, in fewer passes than by a mask.
    logits.add_(slots.positions.clamp_max(0).unsqueeze(2), alpha=torch.finfo(logits.dtype).max)
    probabilities = logits.softmax(3)
    mean = slots.mix(probabilities)
    if layer.value_layout is not None:
        share = probabilities.gather(3, slot.unsqueeze(2).expand(-1, -1, layer.group, -1))
        mean.addcmul_(share, v.to(slots.wide) - slots.take(slot)[1])
    return Attended(mean, probabilities, log_mass_of(logits, probabilities) if with_mass else None)


AttendPairs = Callable[..., Attended]
"""What does as `attend_pairs` does."""
