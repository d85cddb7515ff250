"""Attention of one new token's queries over the pairs in their slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...layer_config import LayerConfig
from .attended import Attended
from .coded import attend_unpacked
from .maths import log_mass_of, scaled
from .slots import RunSlots


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
        Of heads of equal capacity, or of a layer's slots as those of one head.
    q
        [B, heads, G, D].
    k, v
        [B, heads, 1, D], the queries' own pair.
    slot
        [B, heads, 1] int64, where it lies; [B, 1, heads] among those of one head.
    with_mass
        Whether `log_mass` is wanted.
    """
    if layer.key_layout is not None:
        return attend_unpacked(layer, slots, q, k, v, slot, with_mass)
    if slots.runs:
        return attend_by_run(attend_pairs, slots, q, k, v, slot, with_mass)
    logits = scaled(layer, slots.products(q))
    # Empty slots have position -1: they get the lowest number, in fewer passes than by a mask.
    logits.add_(slots.positions.clamp_max(0).unsqueeze(2), alpha=torch.finfo(logits.dtype).max)
    probabilities = logits.softmax(3)
    mean = slots.mix(probabilities)
    return Attended(mean, probabilities, log_mass_of(logits, probabilities) if with_mass else None)


def attend_by_run(
    pairs: AttendPairs,
    slots: RunSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    with_mass: bool,
) -> Attended:
    """What `pairs` gives of each run of equal heads, for a layer's slots as those of one head."""
    means, probabilities, masses = [], [], []
    slot = slot.transpose(1, 2) - slots.first.unsqueeze(1)
    for run in slots.runs:
        heads = run.kv_heads
        given = (q[:, heads], k[:, heads], v[:, heads], slot[:, heads])
        found = pairs(run.layer, slots.of_run(run), *given, with_mass=with_mass)
        means.append(found.mean)
        probabilities.append(found.probabilities.transpose(1, 2).flatten(2))
        if found.log_mass is not None:
            masses.append(found.log_mass)
    return Attended(
        torch.cat(means, 1),
        torch.cat(probabilities, 2).unsqueeze(1),
        torch.cat(masses, 1) if with_mass else None,
    )


AttendPairs = Callable[..., Attended]
"""What does as `attend_pairs` does."""
