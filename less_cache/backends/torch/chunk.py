"""Several new tokens at once: a prompt, a chunk of one, a later turn."""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat.torch as torch_namespace
import torch
from torch import Tensor
from torch.nn import functional as F

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ...policies import Gain
from . import attention
from .maths import (
    INFINITY,
    choose_slot,
    initial_scores,
    merge,
    persistent_bits,
    popcount,
    protected_pairs,
    scaled,
)
from .slots import RunSlots

Attention = Callable[..., tuple[Tensor, Tensor]]
"""As `attention.in_blocks`: what another backend may bring of its own."""


def attend(
    layer: LayerConfig,
    slots: RunSlots,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    shift: Tensor | None = None,
    attention_function: Attention | None = None,
) -> Tensor:
    """Attend from S tokens over what is held and each other, then let all but C pairs leave.

    Parameters
    ----------
    layer, slots, maps
        Of heads of equal capacity C.
    q
        [B, Hq, S, D].
    k, v
        [B, heads, S, D].
    lengths
        [B].
    mask
        [B, S] booleans; ``None``: no padding.
    shift
        [B, Hq, S], added to the queries' products; ``None``: nothing.
    attention_function
        Takes and gives what `attention.in_blocks` does. Default: what is fastest on the device.

    Returns
    -------
    Tensor
        [B, Hq, S, D].
    """
    batch, kv_heads, new_tokens = k.shape[:3]
    if mask is None:
        mask = torch.ones(batch, new_tokens, dtype=torch.bool, device=k.device)
    else:
        # Padding may hold anything, NaN too, which no bias of -inf would hide.
        padding = ~mask.view(batch, 1, new_tokens, 1)
        q, k, v = (array.masked_fill(padding, 0) for array in (q, k, v))
    ranks = mask.cumsum(1, dtype=torch.int32)
    incoming = ranks[:, -1]

    # 1. Make room for the first incoming token.
    if layer.policy.evicts:
        _evict_one(layer, slots, maps, lengths, (incoming > 0).view(batch, 1, 1))

    # 2. Attend over the pairs kept and the new ones.
    new_positions = torch.where(mask, lengths.view(batch, 1) + ranks - 1, EMPTY)
    new_positions = new_positions.to(slots.positions.dtype).unsqueeze(1).expand(-1, kv_heads, -1)
    positions = torch.cat([slots.positions, new_positions], 2)
    union = slots.join(k, v)
    keys, values = union.keys, union.values
    weight = _query_weights(layer, mask, ranks, incoming, slots.wide)
    attend_new = attention_function or attention.fastest(q.device)
    out, gained = attend_new(layer, slots, maps, q, keys, values, positions, weight, shift)
    out.masked_fill_(~mask.view(batch, 1, new_tokens, 1), 0)

    # 3. Scores.
    total = lengths + incoming
    if slots.scores is None:
        scores = initial_scores(layer, keys, positions, slots.wide)
    else:
        first = initial_scores(layer, k, new_positions, slots.wide)
        scores = torch.cat([slots.scores, first], 2)
    history = None
    if slots.history is not None:
        history = torch.cat([slots.history, torch.zeros_like(new_positions, dtype=torch.int64)], 2)
    if layer.policy.gains is Gain.HISTORY and history is not None:
        history = _history(layer, history, q, keys, positions, ranks, incoming, slots.wide)
        scores = popcount(history).to(slots.wide)
    elif layer.policy.gains is Gain.SUM:
        if layer.policy.pool > 1:
            pooled = _pooled(gained, positions, layer.policy.pool)
            gained = torch.where((incoming > 1).view(batch, 1, 1), pooled, gained)
        scores = scores * torch.pow(layer.policy.decay, incoming.to(slots.wide)).view(batch, 1, 1)
        scores = scores + gained
    elif layer.policy.gains is Gain.GIVEN:
        scores, history = _given(layer, scores, history, q, keys, positions, mask)

    # 4. The new pairs are in; all but C leave.
    leaving, staying = _select(layer, scores, positions, total)
    if maps is not None:
        gone = positions.gather(2, leaving) != EMPTY
        old_keys, old_values = union.take(leaving)
        merge(slots, maps.psi(old_keys), old_values, gone)
    kept = positions.gather(2, staying)
    empty = kept == EMPTY
    slots.replace(union, staying, empty)
    if slots.scores is not None:
        slots.scores.copy_(scores.gather(2, staying).masked_fill_(empty, 0))
    slots.positions.copy_(kept)
    if slots.history is not None and history is not None:
        slots.history.copy_(history.gather(2, staying).masked_fill_(empty, 0))
    return out


def _evict_one(
    layer: LayerConfig,
    slots: RunSlots,
    maps: LayerMaps | None,
    lengths: Tensor,
    incoming: Tensor,
) -> None:
    """Where a row is full and has new tokens, its victim leaves; its slot becomes empty."""
    slot = choose_slot(layer, slots, lengths)
    position = slots.positions.gather(2, slot)
    evicted = (position != EMPTY) & incoming
    if maps is not None:
        key, value = slots.take(slot)
        merge(slots, maps.psi(key), value, evicted)
    slots.positions.scatter_(2, slot, position.masked_fill_(evicted, EMPTY))


def _query_weights(
    layer: LayerConfig, mask: Tensor, ranks: Tensor, incoming: Tensor, wide: torch.dtype
) -> Tensor | None:
    """[B, S], what each query's probabilities count for: the decay to the power of its age."""
    policy = layer.policy
    if policy.gains is not Gain.SUM:
        return None
    age = incoming.view(-1, 1) - ranks
    weight = torch.pow(policy.decay, age.to(wide)) * mask
    return weight if policy.counted is None else weight.masked_fill_(age >= policy.counted, 0)


def _pooled(gained: Tensor, positions: Tensor, neighbours: int) -> Tensor:
    """The mean of [B, heads, N] over so many held pairs, neighbours in order of position."""
    order = positions.argsort(2)
    # Empty slots come first and gained nothing: like the zeros beyond the ends.
    ordered = gained.gather(2, order)
    reach = neighbours // 2
    mean = F.avg_pool1d(ordered, neighbours, stride=1, padding=reach, count_include_pad=True)
    return torch.empty_like(gained).scatter_(2, order, mean)


def _history(
    layer: LayerConfig,
    old: Tensor,
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    ranks: Tensor,
    incoming: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """[B, heads, N] int64: each pair's bits after the new queries, of which the last few count."""
    batch, kv_heads = keys.shape[:2]
    new_tokens = q.shape[2]
    window = layer.policy.history_window
    last = min(window, new_tokens)
    # The columns of the last real queries, oldest first; below 1, a row has fewer.
    wanted = incoming.view(-1, 1) - torch.arange(last - 1, -1, -1, device=q.device)
    column = torch.searchsorted(ranks, wanted.to(ranks.dtype)).clamp_max_(new_tokens - 1)
    index = column.view(batch, 1, last, 1).expand(-1, q.shape[1], -1, q.shape[3])
    queries = q.gather(2, index).reshape(batch, kv_heads, -1, q.shape[3])
    visible = (positions != EMPTY).unsqueeze(2) & (
        torch.arange(keys.shape[2], device=q.device) - (keys.shape[2] - new_tokens)
        <= column.view(batch, 1, last, 1)
    )
    share = _probabilities(layer, queries, keys, visible, wide).mean(2)
    bits = persistent_bits(share, visible.sum(3, keepdim=True), visible)
    bits = bits * (wanted > 0).view(batch, 1, last, 1)
    age = torch.arange(last - 1, -1, -1, device=q.device).view(1, 1, last, 1)
    recent = (bits << age).sum(2)
    # Bits beyond the window fall off; a shift by 64 or more would be undefined.
    shift = incoming.clamp_max(window).to(torch.int64).view(batch, 1, 1)
    return ((old << shift) | recent) & (2**window - 1)


def _probabilities(
    layer: LayerConfig, queries: Tensor, keys: Tensor, visible: Tensor, wide: torch.dtype
) -> Tensor:
    """The softmax over the visible pairs, [B, heads, G, S, N]; of no pair at all: zeros.

    Parameters
    ----------
    layer
        For the logits.
    queries
        [B, heads, G · S, D].
    keys
        [B, heads, N, D].
    visible
        [B, heads or 1, S, N].
    wide
        The dtype of computing.
    """
    logits = scaled(layer, queries.to(wide) @ keys.to(wide).transpose(2, 3))
    logits = logits.view(*keys.shape[:2], layer.group, -1, keys.shape[2])
    hidden = ~visible.unsqueeze(2)
    return logits.masked_fill_(hidden, -INFINITY).softmax(4).masked_fill_(hidden, 0)


def _given(
    layer: LayerConfig,
    scores: Tensor,
    history: Tensor | None,
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What a user's own policy makes of the new queries: scores and history, [B, heads, N]."""
    kept = keys.shape[2] - q.shape[2]
    bits = torch.zeros_like(positions, dtype=torch.int64) if history is None else history
    scores, bits = scores.clone(), bits.clone()
    for row in range(q.shape[0]):
        one = slice(row, row + 1)
        # A policy knows no padding: it sees a row's real queries, and every column that there is.
        columns = mask[row].nonzero().flatten()
        for start in range(0, len(columns), attention.QUERIES_A_BLOCK):
            block = columns[start : start + attention.QUERIES_A_BLOCK]
            queries = q[one, :, block]
            visible = (positions[one] != EMPTY).unsqueeze(2) & (
                torch.arange(keys.shape[2], device=q.device) - kept <= block.view(-1, 1)
            )
            grouped = queries.reshape(1, keys.shape[1], -1, q.shape[3])
            probabilities = _probabilities(layer, grouped, keys[one], visible, scores.dtype)
            scores[one], bits[one] = layer.policy.update(
                torch_namespace, scores[one], bits[one], probabilities, visible
            )
    return scores, None if history is None else bits


def _select(
    layer: LayerConfig, scores: Tensor, positions: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Which columns leave and which stay, C of them, by (protected, score, position).

    No pair's score changes while pairs leave one by one, so one sort finds them all.
    """
    empty = positions == EMPTY
    ranked = scores.masked_fill(protected_pairs(layer, positions, total), INFINITY)
    ranked = ranked.masked_fill_(empty, -INFINITY)
    by_age = positions.argsort(2)
    by_score = ranked.gather(2, by_age).argsort(dim=2, stable=True)
    order = by_age.gather(2, by_score)
    leaving, staying = order.split([order.shape[2] - layer.capacity, layer.capacity], 2)
    # Slots in order of age, empty ones last: easier to read, and the same for every padding.
    age = positions.gather(2, staying)
    age = age.masked_fill(age == EMPTY, torch.iinfo(age.dtype).max)
    return leaving, staying.gather(2, age.argsort(dim=2, stable=True))
