"""Several new tokens at once in the PyTorch backend: a prompt, a chunk of one, a later turn.

Queries go in blocks, so that no [S, S] matrix is ever held: the largest temporary is one block's
logits, `BLOCK_BYTES` of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import LayerConfig
from ..feature_maps import LayerMaps
from ..policies import Score
from ..state import EMPTY, LayerState
from .torch_common import (
    INFINITY,
    attend,
    choose_slot,
    initial_scores,
    merge,
    pair_logits,
    persistent_bits,
    popcount,
    protected_pairs,
    take_slot,
)

Attention = Callable[..., tuple[Tensor, Tensor]]

BLOCK_BYTES = 64 * 2**20
"""What one block's logits may take."""


def append(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attention: Attention | None = None,
) -> Tensor:
    """`CacheManager.append` for S > 1 tokens; see `Backend.append`.

    Another backend may bring its own `attention`, which takes and gives what `_attend_in_blocks`
    does.
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
    _evict_one(layer, state, maps, (incoming > 0).view(batch, 1, 1))

    # 2. Attend over the pairs kept and the new ones.
    seen = state.length
    new_positions = torch.where(mask, seen.view(batch, 1) + ranks - 1, EMPTY)
    new_positions = new_positions.unsqueeze(1).expand(-1, kv_heads, -1)
    positions = torch.cat([state.positions, new_positions], 2)
    keys, values = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
    weight = _query_weights(layer, mask, ranks, incoming, state.scores.dtype)
    attend_new = attention or _attend_in_blocks
    out, gained = attend_new(layer, state, maps, q, keys, values, positions, weight)
    out.masked_fill_(~mask.view(batch, 1, new_tokens, 1), 0)

    # 3. Scores.
    first = initial_scores(layer, state, k, new_positions)
    total = seen + incoming
    history = None
    if state.history is not None:
        history = _history(layer, state, q, keys, positions, ranks, incoming)
        scores = popcount(history).to(first.dtype)
    elif layer.policy.score is Score.ATTENTION:
        faded = torch.pow(layer.policy.decay, incoming.to(first.dtype)).view(batch, 1, 1)
        scores = torch.cat([state.scores * faded, first], 2) + gained
    else:
        scores = torch.cat([state.scores, first], 2)

    # 4. The new pairs are in; all but C leave.
    leaving, staying = _select(layer, scores, positions, total)
    if maps is not None:
        gone = positions.gather(2, leaving) != EMPTY
        merge(state, maps.psi(_take(keys, leaving)), _take(values, leaving), gone)
    kept = positions.gather(2, staying)
    empty = kept == EMPTY
    state.keys.copy_(_take(keys, staying).masked_fill_(empty.unsqueeze(3), 0))
    state.values.copy_(_take(values, staying).masked_fill_(empty.unsqueeze(3), 0))
    state.scores.copy_(scores.gather(2, staying).masked_fill_(empty, 0))
    state.positions.copy_(kept)
    if state.history is not None and history is not None:
        state.history.copy_(history.gather(2, staying).masked_fill_(empty, 0))
    state.length.copy_(total)
    return out


def _evict_one(
    layer: LayerConfig, state: LayerState, maps: LayerMaps | None, incoming: Tensor
) -> None:
    """Where a row is full and has new tokens, its victim leaves; its slot becomes empty."""
    if layer.policy.score is Score.NONE:
        return
    slot = choose_slot(layer, state)
    evicted = (state.positions.gather(2, slot) != EMPTY) & incoming
    if maps is not None:
        features = maps.psi(take_slot(state.keys, slot))
        merge(state, features, take_slot(state.values, slot), evicted)
    position = state.positions.gather(2, slot).masked_fill_(evicted, EMPTY)
    state.positions.scatter_(2, slot, position)


def _query_weights(
    layer: LayerConfig, mask: Tensor, ranks: Tensor, incoming: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """[B, S], what each query's probabilities count for: the decay to the power of its age."""
    if layer.policy.score is not Score.ATTENTION:
        return None
    age = (incoming.view(-1, 1) - ranks).to(dtype)
    return torch.pow(layer.policy.decay, age) * mask


def _attend_in_blocks(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The outputs [B, Hq, S, D], and each pair's weighted sum of probabilities [B, Hkv, N]."""
    batch, query_heads, new_tokens, head_dim = q.shape
    capacity = state.keys.shape[2]
    wide = state.scores.dtype
    out = torch.empty_like(q)
    gained = torch.zeros(positions.shape, dtype=wide, device=q.device)
    # The lowest number, not -inf, so that padding which sees nothing has a softmax all the same.
    lowest = torch.finfo(wide).min
    bias = torch.zeros_like(gained).masked_fill_(positions == EMPTY, lowest).unsqueeze(2)
    row_bytes = batch * query_heads * keys.shape[2] * wide.itemsize
    block = max(1, min(new_tokens, BLOCK_BYTES // row_bytes))
    for start in range(0, new_tokens, block):
        stop = min(start + block, new_tokens)
        span = capacity + stop
        queries = q[:, :, start:stop]
        shape = (batch, layer.kv_heads, layer.group, stop - start)
        visible = bias[..., :span] + _causal(start, stop, capacity, q.device, wide)
        grouped = queries.reshape(batch, layer.kv_heads, -1, head_dim)
        logits = pair_logits(layer, grouped, keys[:, :, :span], wide)
        logits.add_(visible.repeat(1, 1, layer.group, 1) if layer.group > 1 else visible)
        part, probabilities = attend(
            state, None if maps is None else maps.phi(queries), logits, values[:, :, :span]
        )
        out[:, :, start:stop] = part.view(batch, query_heads, stop - start, head_dim)
        if weight is not None:
            share = weight[:, None, None, start:stop].expand(shape).reshape(*shape[:2], 1, -1)
            gained[:, :, :span] += (share @ probabilities).squeeze(2)
    return out, gained


def _causal(start: int, stop: int, kept: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[stop - start, kept + stop]: 0 for old pairs and new ones up to the query, else -inf."""
    query = torch.arange(start, stop, device=device).unsqueeze(1)
    column = torch.arange(-kept, stop, device=device)
    return torch.where(column <= query, 0.0, -INFINITY).to(dtype)


def _history(
    layer: LayerConfig,
    state: LayerState,
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    ranks: Tensor,
    incoming: Tensor,
) -> Tensor:
    """[B, Hkv, N] int64: each pair's bits after the new queries, of which the last few count."""
    batch, kv_heads = keys.shape[:2]
    new_tokens = q.shape[2]
    window = layer.policy.history_window
    last = min(window, new_tokens)
    # The columns of the last real queries, oldest first; below 1, a row has fewer.
    wanted = incoming.view(-1, 1) - torch.arange(last - 1, -1, -1, device=q.device)
    column = torch.searchsorted(ranks, wanted.to(ranks.dtype)).clamp_max_(new_tokens - 1)
    index = column.view(batch, 1, last, 1).expand(-1, q.shape[1], -1, q.shape[3])
    queries = q.gather(2, index).view(batch, kv_heads, -1, q.shape[3])
    visible = (positions != EMPTY).unsqueeze(2) & (
        torch.arange(keys.shape[2], device=q.device) - state.keys.shape[2]
        <= column.view(batch, 1, last, 1)
    )
    logits = pair_logits(layer, queries, keys, state.scores.dtype)
    logits = logits.view(batch, kv_heads, layer.group, last, -1)
    share = logits.masked_fill_(~visible.unsqueeze(2), -INFINITY).softmax(4).mean(2)
    bits = persistent_bits(share, visible.sum(3, keepdim=True), visible)
    bits = bits * (wanted > 0).view(batch, 1, last, 1)
    age = torch.arange(last - 1, -1, -1, device=q.device).view(1, 1, last, 1)
    recent = (bits << age).sum(2)
    # Bits beyond the window fall off; a shift by 64 or more would be undefined.
    shift = incoming.clamp_max(window).to(torch.int64).view(batch, 1, 1)
    old = torch.cat([state.history, torch.zeros_like(recent[:, :, state.keys.shape[2] :])], 2)  # type: ignore[list-item]
    return ((old << shift) | recent) & (2**window - 1)


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


def _take(array: Tensor, columns: Tensor) -> Tensor:
    """``array[b, h, columns]`` of [B, Hkv, N, D]."""
    return array.gather(2, columns.unsqueeze(3).expand(-1, -1, -1, array.shape[3]))
