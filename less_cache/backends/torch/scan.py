"""When pairs of known sequences leave: the policy alone, for all heads of a layer at once.

The state is dense over the sequence, not over slots, so that heads of any capacities are one array.
A pair that has left weighs nothing (a bias of -inf), and its score is +inf: nothing evicts it
again. Columns lie by age, so the first of the least scores is the oldest one's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layer_config import LayerConfig
from ...policies import Gain, Policy, Start
from ...quantization import codes
from ..following import window_times
from .attention import BLOCK_BYTES
from .maths import INFINITY, initial_scores, persistent_bits, popcount, scaled


def eviction_times(layer: LayerConfig, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """`Backend.eviction_times` of tokens that come one by one.

    Parameters
    ----------
    layer
        Its policy evicts, and is none of a user's own.
    q, k, mask
        As of `Backend.eviction_times`.
    """
    if mask is None:
        return _times(layer, q, k)
    # A sort that keeps the order puts the tokens first: their columns then are their positions.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    q, k = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (q, k))
    times = _times(layer, q, k).long()
    batch, heads, tokens = times.shape
    # What leaves behind a row's last token does not leave.
    ends = torch.cat([order, torch.full_like(order[:, :1], tokens)], 1)
    gone = times < mask.sum(1).view(batch, 1, 1)
    columns = order.unsqueeze(1).expand(-1, heads, -1)
    left = ends.unsqueeze(1).expand(-1, heads, -1).gather(2, times.masked_fill_(~gone, tokens))
    found = torch.empty_like(left).scatter_(2, columns, left)
    own = torch.arange(tokens, device=k.device)
    return torch.where(mask.unsqueeze(1), found, own).to(torch.int32)


def _times(layer: LayerConfig, q: Tensor, k: Tensor) -> Tensor:
    """[B, Hkv, N] int32 without padding, N for pairs that stay."""
    if layer.policy.starts is Start.POSITION:
        return window_times(layer, k)
    tokens = k.shape[2]
    pairs = _Pairs(layer, k)
    if layer.policy.gains is Gain.NONE:
        for token in range(tokens):
            pairs.make_room(token)
        return pairs.times[:, :, :tokens].contiguous()
    stored = k.to(pairs.wide)
    if layer.key_layout is not None:
        stored = codes.decode(layer.key_layout, *codes.encode(layer.key_layout, stored), pairs.wide)
    row_bytes = q.shape[0] * q.shape[1] * tokens * pairs.wide.itemsize
    block = max(1, min(tokens, BLOCK_BYTES // row_bytes))
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        queries = q[:, :, start:stop].to(pairs.wide).unflatten(1, (layer.kv_heads, layer.group))
        products = queries.flatten(2, 3) @ stored[:, :, :stop].transpose(2, 3)
        products = products.unflatten(2, (layer.group, -1))
        if layer.key_layout is not None:
            # In its own step a coded pair is attended as it came.
            own = (queries * k[:, :, start:stop].to(pairs.wide).unsqueeze(2)).sum(4)
            products.diagonal(start, 3, 4).copy_(own)
        logits = scaled(layer, products)
        for token in range(start, stop):
            pairs.make_room(token)
            pairs.gain(token, logits[:, :, :, token - start, : token + 1])
    return pairs.times[:, :, :tokens].contiguous()


class _Pairs:
    """What the policy holds of every token's pair, those to come included.

    Attributes
    ----------
    times
        [B, Hkv, N + 1] int32; the last column is nobody's, and takes what is to have no effect.
    """

    def __init__(self, layer: LayerConfig, k: Tensor) -> None:
        batch, heads, tokens, _ = k.shape
        device = k.device
        self.wide = torch.promote_types(k.dtype, torch.float32)
        self.policy: Policy = layer.policy
        self.fewest, self.most = min(layer.capacities), max(layer.capacities)
        self.capacities = torch.tensor(layer.capacities, device=device).view(heads, 1)
        every = torch.arange(tokens + 1, device=device)
        self.tokens = tokens
        self.times = torch.full(
            (batch, heads, tokens + 1), tokens, dtype=torch.int32, device=device
        )
        # -inf at pairs that have left, else 0.
        self.bias = torch.zeros(batch, heads, tokens + 1, dtype=self.wide, device=device)
        self.scores = torch.zeros_like(self.bias)
        first = initial_scores(layer, k, every[:tokens].expand(batch, heads, -1), self.wide)
        self.scores[:, :, :tokens] = first
        self.history = torch.zeros_like(self.bias, dtype=torch.int64)
        # Column tokens - t + c tells whether pair c is among the recent ones before token t.
        recent = torch.tensor([p.protected_recent for p in layer.policies], device=device)
        self.recent = every[:tokens] >= tokens - recent.view(heads, 1)

    def make_room(self, token: int) -> None:
        """Where all slots are taken before `token` comes, one pair leaves."""
        if token < self.fewest:
            return
        sinks = self.policy.sinks
        protected = self.recent[:, self.tokens - token + sinks :]
        ranked = self.scores[:, :, sinks:token].masked_fill(protected, INFINITY)
        victim = ranked.argmin(2, keepdim=True) + sinks
        if token < self.most:
            victim = torch.where(self.capacities <= token, victim, self.tokens)
        self.times.scatter_(2, victim, token)
        self.bias.scatter_(2, victim, -INFINITY)
        self.scores.scatter_(2, victim, INFINITY)

    def gain(self, token: int, logits: Tensor) -> None:
        """Give scores what the query of `token` makes of logits [B, Hkv, G, token + 1]."""
        bias = self.bias[:, :, : token + 1]
        scores = self.scores[:, :, : token + 1]
        probabilities = (logits + bias.unsqueeze(2)).softmax(3)
        if self.policy.gains is Gain.HISTORY:
            history = self.history[:, :, : token + 1]
            held = self.capacities.clamp_max(token + 1)
            bits = persistent_bits(probabilities.mean(2), held, bias == 0)
            history.bitwise_left_shift_(1).bitwise_or_(bits)
            history.bitwise_and_(2**self.policy.history_window - 1)
            torch.sub(popcount(history).to(self.wide), bias, out=scores)
        elif self.policy.decay == 0:
            torch.sub(probabilities.sum(2), bias, out=scores)
        else:
            scores.mul_(self.policy.decay).add_(probabilities.sum(2))
