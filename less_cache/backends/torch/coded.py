"""Attention of one new token's queries over codes, with nothing compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layer_config import LayerConfig
from .attended import Attended
from .fields import Fields, fields_of
from .maths import log_mass_of, scaled
from .slots import RunSlots

BLOCK_BYTES = 8 * 2**20
"""What the unpacked fields of one block of rows may take on a CPU, in whose cache they stay."""

DEVICE_BLOCK_BYTES = 256 * 2**20
"""Elsewhere, where operators should be few and large."""


def attend_unpacked(
    layer: LayerConfig,
    slots: RunSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    with_mass: bool,
) -> Attended:
    """`attend_pairs` over codes, of heads of equal capacity or of any."""
    if layer.key_layout is None or layer.value_layout is None:
        raise AssertionError("there are no codes")
    wide, device = slots.wide, slots.positions.device
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    stored = slots.chosen_pairs()
    keys = fields_of(layer.key_layout, wide, device)
    values = fields_of(layer.value_layout, wide, device)

    products = _products(slots, keys, stored["keys"], q @ keys.matrix)
    products.mul_(stored["key_scales"].to(wide).unsqueeze(2))
    own = (q * k).sum(3, keepdim=True)
    place = slot.unsqueeze(2).expand(-1, -1, layer.group, -1)
    products.scatter_(3, place, own.transpose(1, 3) if slots.runs else own)
    logits = scaled(layer, products)
    # Empty slots have position -1: they get the lowest number, in fewer passes than by a mask.
    logits.add_(slots.positions.clamp_max(0).unsqueeze(2), alpha=torch.finfo(wide).max)
    probabilities, log_mass = _softmax(slots, logits, with_mass)

    share = probabilities.gather(3, place)
    weights = probabilities * stored["value_scales"].to(wide).unsqueeze(2)
    weights.scatter_(3, place, 0.0)
    mean = _mix(slots, values, stored["values"], weights) @ values.matrix.T
    mean.addcmul_(share.transpose(1, 3) if slots.runs else share, v)
    return Attended(mean, probabilities, log_mass)


def _blocks(fields: Fields, packed: Tensor) -> list[slice]:
    """Rows of [B, heads, C, nbytes] that are unpacked together."""
    rows, heads, slots, _ = packed.shape
    row_bytes = heads * slots * fields.matrix.shape[1] * fields.matrix.itemsize
    most = BLOCK_BYTES if packed.device.type == "cpu" else DEVICE_BLOCK_BYTES
    size = max(1, most // max(1, row_bytes))
    return [slice(start, start + size) for start in range(0, rows, size)]


def _products(slots: RunSlots, fields: Fields, packed: Tensor, queries: Tensor) -> Tensor:
    """Queries [B, heads, G, E] with the fields of every slot: as `Attended.probabilities` lies."""
    found = []
    for rows in _blocks(fields, packed):
        unpacked, own = fields.rows(packed[rows]), queries[rows]
        if slots.runs:
            parts = [
                torch.bmm(own[:, h], unpacked[:, 0, :, own_slots])
                for h, own_slots in slots.each_head()
            ]
            found.append(torch.cat(parts, 2).unsqueeze(1))
        else:
            found.append(own @ unpacked)
    return found[0] if len(found) == 1 else torch.cat(found)


def _mix(slots: RunSlots, fields: Fields, packed: Tensor, weights: Tensor) -> Tensor:
    """The sums [B, heads, G, E] of every slot's fields by weights that lie as probabilities do."""
    found = []
    for rows in _blocks(fields, packed):
        unpacked, own = fields.rows(packed[rows]).transpose(2, 3), weights[rows]
        if slots.runs:
            parts = [
                torch.bmm(own[:, 0, :, own_slots], unpacked[:, 0, own_slots])
                for _, own_slots in slots.each_head()
            ]
            found.append(torch.stack(parts, 1))
        else:
            found.append(own @ unpacked)
    return found[0] if len(found) == 1 else torch.cat(found)


def _softmax(slots: RunSlots, logits: Tensor, with_mass: bool) -> tuple[Tensor, Tensor | None]:
    """Probabilities as the logits lie, and the heads' log masses [B, heads, G, 1]."""
    if not slots.runs:
        probabilities = logits.softmax(3)
        return probabilities, log_mass_of(logits, probabilities) if with_mass else None
    parts, masses = [], []
    for run in slots.runs:
        own = logits[:, 0, :, run.slots].unflatten(2, (run.heads, run.layer.capacity))
        part = own.softmax(3)
        parts.append(part.flatten(2))
        if with_mass:
            masses.append(log_mass_of(own, part).transpose(1, 2))
    probabilities = torch.cat(parts, 2).unsqueeze(1)
    return probabilities, torch.cat(masses, 1) if with_mass else None
