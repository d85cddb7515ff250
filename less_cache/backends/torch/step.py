"""The fast PyTorch backend, for CPU and GPU.

Static shapes, the state updated in place, no Python loop over batch, heads or slots. A decode step
(S = 1) never waits for the device and works under ``torch.compile(fullgraph=True)``; more tokens
at once go through `torch_chunk`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig, LayerConfig
from ..feature_maps import LayerMaps
from ..policies import Score
from ..state import EMPTY, LayerState
from . import torch_chunk
from .torch_common import (
    attend,
    choose_slot,
    initial_scores,
    merge,
    pair_logits,
    persistent_bits,
    popcount,
    take_slot,
)
from .torch_maps import join


def check_config(config: CacheConfig) -> None:
    """Refuse policies whose scores only Python code defines.

    Raises
    ------
    ValueError
        If a layer's policy is a user's own.
    """
    for i, policy in enumerate(config.policies):
        if policy.score is Score.CUSTOM:
            raise ValueError(
                f"policy: layer {i} has {policy}, whose update() only backend 'reference' runs"
            )


def prepare_maps(maps: LayerMaps, layer: LayerConfig, device: Any) -> LayerMaps:
    """The maps on the state's device: in the model's dtype on a GPU, wider on a CPU."""
    name = layer.score_dtype if torch.device(device).type == "cpu" else layer.dtype
    return join(maps.to(device, getattr(torch, name)))


def append(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`CacheManager.append` for one layer; see `Backend.append`."""
    with torch.no_grad():
        if k.shape[2] == 1:
            return step(layer, state, maps, q, k, v, mask)
        return torch_chunk.append(layer, state, maps, q, k, v, mask)


def step(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """One new token: the victim's slot, or the first empty one, becomes the new pair's."""
    batch, kv_heads = k.shape[:2]
    incoming = None if mask is None else mask[:, 0].view(batch, 1, 1)

    # 1. Make room. An empty slot counts as a victim that leaves nothing behind.
    slot = choose_slot(layer, state)
    old_positions = state.positions.gather(2, slot)
    evicted = old_positions != EMPTY
    if incoming is not None:
        evicted = evicted & incoming
    features = None
    if maps is not None:
        features, victims = maps.both(q, take_slot(state.keys, slot))
        merge(state, victims, take_slot(state.values, slot), evicted)

    # 4, before 2: the pair goes in first, so that a query sees itself like any other pair.
    positions = state.length.view(batch, 1, 1).expand(batch, kv_heads, 1)
    new: dict[str, Tensor] = {
        "keys": k,
        "values": v,
        "positions": positions,
        "scores": initial_scores(layer, state, k, positions),
    }
    if state.history is not None:
        new["history"] = torch.zeros_like(slot)
    for name, value in new.items():
        _write_slot(getattr(state, name), slot, value, incoming)

    # 2. Attend.
    grouped = q.view(batch, kv_heads, layer.group, layer.head_dim)
    logits = pair_logits(layer, grouped, state.keys, state.scores.dtype)
    # Empty slots have position -1: they get the lowest number, in fewer passes than by a mask.
    logits.add_(state.positions.clamp_max(0).unsqueeze(2), alpha=torch.finfo(logits.dtype).max)
    out, probabilities = attend(state, features, logits, state.values)
    out = out.to(q.dtype).view_as(q)
    if mask is not None:
        out = out.masked_fill(~mask.view(batch, 1, 1, 1), 0)

    # 3. Scores, from the softmax over the pairs alone.
    if layer.policy.score is Score.ATTENTION:
        faded = state.scores if layer.policy.decay == 1 else state.scores * layer.policy.decay
        _write(state.scores, faded + probabilities.sum(2), incoming)
    elif state.history is not None:
        held = state.positions != EMPTY
        persistent = persistent_bits(probabilities.mean(2), held.sum(2, keepdim=True), held)
        keep = 2**layer.policy.history_window - 1
        _write(state.history, ((state.history << 1) | persistent) & keep, incoming)
        _write(state.scores, popcount(state.history).to(state.scores.dtype), incoming)
    state.length.add_(1 if mask is None else mask[:, 0])
    return out


def _write_slot(array: Tensor, slot: Tensor, value: Tensor, incoming: Tensor | None) -> None:
    """``array[b, h, slot] = value`` in the rows that have a new token."""
    index = slot
    if array.ndim == 4:
        index = slot.unsqueeze(3).expand(-1, -1, -1, array.shape[3])
        incoming = None if incoming is None else incoming.unsqueeze(3)
    value = value.to(array.dtype)
    if incoming is not None:
        value = torch.where(incoming, value, array.gather(2, index))
    array.scatter_(2, index, value)


def _write(array: Tensor, value: Tensor, incoming: Tensor | None) -> None:
    array.copy_(value if incoming is None else torch.where(incoming, value, array))
