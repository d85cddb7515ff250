"""A decode step: one new token a row."""

from __future__ import annotations

import array_api_compat.torch as torch_namespace
import torch
from torch import Tensor

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...policies import Gain
from .maps import JoinedMaps
from .maths import (
    choose_slot,
    initial_scores,
    merge,
    persistent_bits,
    popcount,
    with_low_rank,
)
from .pairs import AttendPairs, attend_pairs
from .slots import RunSlots


def attend(
    layer: LayerConfig,
    slots: RunSlots,
    maps: JoinedMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    shift: Tensor | None = None,
    *,
    pairs: AttendPairs = attend_pairs,
) -> Tensor:
    """The victim's slot, or the first empty one, becomes the new pair's.

    Parameters
    ----------
    layer, slots, maps
        Of heads of equal capacity, or of all heads of a layer (`slots.open_layer`).
    q
        [B, Hq, 1, D].
    k, v
        [B, Hkv, 1, D].
    lengths
        [B].
    mask
        [B, 1] booleans.
    shift
        [B, Hq, 1], added to the queries' products; ``None``: nothing. Not with a soft cap.
    pairs
        What attends over the slots.

    Returns
    -------
    Tensor
        [B, Hq, 1, D].
    """
    batch, kv_heads = k.shape[:2]
    incoming = None if mask is None else mask[:, 0].view(batch, 1, 1)

    # 1. Make room. An empty slot counts as a victim that leaves nothing behind.
    slot = choose_slot(layer, slots, lengths)
    features = None
    if maps is not None:
        evicted = slots.turned(slots.positions.gather(2, slot)) != EMPTY
        if incoming is not None:
            evicted = evicted & incoming
        key, value = (slots.turned(x) for x in slots.take(slot))
        features, victims = maps.both(q, key)
        merge(slots, victims, value, evicted)

    # 4, before 2: the pair goes in first, so that a query sees itself like any other pair.
    positions = lengths.view(batch, 1, 1).expand(batch, kv_heads, 1)
    if slots.scores is not None:
        first = initial_scores(layer, k, positions, slots.wide)
        _write_slot(slots.scores, slot, slots.turned(first), incoming)
    _write_slot(slots.positions, slot, slots.turned(positions), incoming)
    if slots.history is not None:
        _write_slot(slots.history, slot, torch.zeros_like(slot), incoming)
    slots.put(slot, slots.turned(k), slots.turned(v), incoming)

    # 2. Attend.
    grouped = q.reshape(batch, kv_heads, layer.group, layer.head_dim)
    out, probabilities, log_mass = pairs(
        layer, slots, grouped, k, v, slot, with_mass=features is not None
    )
    if features is not None and log_mass is not None:
        features = features.reshape(batch, kv_heads, layer.group, -1)
        if shift is not None:
            # Common to all pairs of a query, it only tells against the low-rank state.
            log_mass = log_mass.add(shift.view(log_mass.shape), alpha=layer.scale)
        out = with_low_rank(slots, features, out, log_mass)
    out = out.to(q.dtype).view_as(q)
    if mask is not None:
        out = out.masked_fill(~mask.view(batch, 1, 1, 1), 0)

    # 3. Scores, from the softmax over the pairs alone.
    _update_scores(layer, slots, probabilities, incoming)
    return out


def _update_scores(
    layer: LayerConfig, slots: RunSlots, probabilities: Tensor, incoming: Tensor | None
) -> None:
    """Give the scores what one query's probabilities earn, which lie as the scores do."""
    policy = layer.policy
    if slots.scores is None:
        return
    if policy.gains is Gain.SUM:
        faded = slots.scores if policy.decay == 1 else slots.scores * policy.decay
        _write(slots.scores, faded + probabilities.sum(2), incoming)
    elif policy.gains is Gain.HISTORY and slots.history is not None:
        held = slots.positions != EMPTY
        persistent = persistent_bits(probabilities.mean(2), held.sum(2, keepdim=True), held)
        keep = 2**policy.history_window - 1
        _write(slots.history, ((slots.history << 1) | persistent) & keep, incoming)
        _write(slots.scores, popcount(slots.history).to(slots.wide), incoming)
    elif policy.gains is Gain.GIVEN:
        held = slots.positions != EMPTY
        history = torch.zeros_like(held, dtype=torch.int64)
        scores, history = policy.update(
            torch_namespace,
            slots.scores,
            history if slots.history is None else slots.history,
            probabilities.unsqueeze(3),
            held.unsqueeze(2),
        )
        _write(slots.scores, scores.masked_fill(~held, 0), incoming)
        if slots.history is not None:
            _write(slots.history, history.masked_fill(~held, 0), incoming)


def _write_slot(array: Tensor, slot: Tensor, value: Tensor, incoming: Tensor | None) -> None:
    """``array[b, h, slot] = value`` in the rows that have a new token."""
    value = value.to(array.dtype)
    if incoming is not None:
        value = torch.where(incoming, value, array.gather(2, slot))
    array.scatter_(2, slot, value)


def _write(array: Tensor, value: Tensor, incoming: Tensor | None) -> None:
    array.copy_(value if incoming is None else torch.where(incoming, value, array))
