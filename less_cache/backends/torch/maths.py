"""What a decode step and a chunk of tokens share in the PyTorch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerConfig
from ..policies import Score
from ..state import EMPTY, LayerState

INFINITY = float("inf")


def protected_pairs(layer: LayerConfig, positions: Tensor, seen: Tensor) -> Tensor:
    """Which pairs the policy never evicts, when `seen` tokens came before the incoming one.

    Parameters
    ----------
    layer
        For the policy.
    positions
        [B, Hkv, N].
    seen
        [B].
    """
    policy = layer.policy
    recent = positions >= (seen - policy.protected_recent).view(-1, 1, 1)
    return recent | (positions < policy.sinks) if policy.sinks else recent


def choose_slot(layer: LayerConfig, state: LayerState) -> Tensor:
    """The slot a new pair takes: the first empty one, else the victim's. [B, Hkv, 1] int64."""
    positions = state.positions
    if layer.policy.score is Score.NONE:
        return positions.argmin(2, keepdim=True)
    protected = protected_pairs(layer, positions, state.length)
    if layer.policy.score is Score.POSITION:
        # The score is the position itself: no ties, and one pass less.
        held = positions != EMPTY
        ranked = positions.masked_fill(protected & held, torch.iinfo(positions.dtype).max)
        return ranked.argmin(2, keepdim=True)
    ranked = state.scores.masked_fill(protected, INFINITY)
    least = ranked.amin(2, keepdim=True)
    # Where a slot is empty, every pair may stay: the least position then is the empty slot's.
    least.masked_fill_(positions.amin(2, keepdim=True) == EMPTY, INFINITY)
    oldest = positions.masked_fill(ranked > least, torch.iinfo(positions.dtype).max)
    return oldest.argmin(2, keepdim=True)


def take_slot(array: Tensor, slot: Tensor) -> Tensor:
    """``array[b, h, slot]`` of [B, Hkv, C, D], as [B, Hkv, 1, D]."""
    return array.gather(2, slot.unsqueeze(3).expand(-1, -1, -1, array.shape[3]))


def merge(state: LayerState, features: Tensor, values: Tensor, evicted: Tensor) -> None:
    """H += ψ(k)ᵀ v and z += ψ(k) over the evicted pairs among those given, in place.

    Parameters
    ----------
    state
        H [B, Hkv, R, D] and z [B, Hkv, R] change.
    features
        [B, Hkv, N, R], ψ of the pairs' keys.
    values
        [B, Hkv, N, D].
    evicted
        [B, Hkv, N], which of them leave.
    """
    stays = ~evicted.unsqueeze(3)
    features = features.masked_fill(stays, 0)
    # A slot that leaves nothing may hold anything, and 0 * inf is no 0.
    values = values.to(features.dtype).masked_fill(stays, 0)
    # In place, with sums in the features' dtype even where the state's is narrower.
    if values.shape[2] == 1:
        state.H.addcmul_(features.transpose(2, 3), values)
        state.z.add_(features.squeeze(2))
    else:
        state.H.add_(features.transpose(2, 3) @ values)
        state.z.add_(features.sum(2))


def initial_scores(layer: LayerConfig, state: LayerState, k: Tensor, positions: Tensor) -> Tensor:
    """Scores that new pairs start from. [B, Hkv, S].

    Parameters
    ----------
    layer
        For the policy.
    state
        For the scores' dtype.
    k
        [B, Hkv, S, D].
    positions
        [B, Hkv, S].
    """
    dtype = state.scores.dtype
    if layer.policy.score is Score.POSITION:
        return positions.to(dtype)
    if layer.policy.score is Score.KEY_NORM:
        return -k.to(dtype).norm(dim=3)
    return torch.zeros(k.shape[:3], dtype=dtype, device=k.device)


def attend(
    state: LayerState, features: Tensor | None, logits: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute out = (φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), s being the logits.

    Parameters
    ----------
    state
        For H and z.
    features
        [B, Hq, S, R], φ of the queries; ``None`` for rank 0.
    logits
        [B, Hkv, G * S, N], a group's heads one after another, in the scores' dtype. What is not
        visible is very low, but every row has a finite number: padding may see nothing at all.
    values
        [B, Hkv, N, D].

    Returns
    -------
    out
        [B, Hkv, G * S, D], in the scores' dtype.
    probabilities
        [B, Hkv, G * S, N], the softmax over the pairs alone.
    """
    wide = logits.dtype
    probabilities = logits.softmax(3)
    pairs_mean = (probabilities.to(values.dtype) @ values).to(wide)
    if features is None:
        return pairs_mean, probabilities
    features = features.reshape(*logits.shape[:3], -1)
    low_rank = features @ state.z.to(wide).unsqueeze(3)
    # The largest probability is exp(maximum) / Σ exp(s), which gives the sum away.
    log_mass = logits.amax(3, keepdim=True) - probabilities.amax(3, keepdim=True).log()
    # A mean of two means: no exponential is left that could overflow. An empty state has
    # log 0 = -inf, and the pairs have all the weight.
    pairs_share = torch.sigmoid(log_mass - low_rank.log())
    low_rank_mean = (features @ state.H.to(wide)) / low_rank.clamp_min(torch.finfo(wide).tiny)
    return torch.lerp(low_rank_mean, pairs_mean, pairs_share), probabilities


def pair_logits(layer: LayerConfig, grouped: Tensor, keys: Tensor, wide: torch.dtype) -> Tensor:
    """q·k·scale, soft-capped where the model does so: [B, Hkv, G * S, N]."""
    if grouped.shape[2] == 1:
        # For a single query, a CPU reads the keys up to three times as fast when they come first.
        products = (keys @ grouped.contiguous().transpose(2, 3)).transpose(2, 3)
    else:
        products = grouped @ keys.transpose(2, 3)
    logits = products.to(wide).mul_(layer.scale)
    if layer.softcap is not None:
        logits = logits.div_(layer.softcap).tanh_().mul_(layer.softcap)
    return logits


def persistent_bits(share: Tensor, attended: Tensor, visible: Tensor) -> Tensor:
    """1 where a pair had at least its fair share, 1/n, of a query's attention. int64.

    Parameters
    ----------
    share
        [..., N], probabilities averaged over a group's query heads.
    attended
        [..., 1], n, the pairs that the query attended over.
    visible
        [..., N].
    """
    return ((share * attended >= 1.0 - 1e-6) & visible).to(torch.int64)


def popcount(bits: Tensor) -> Tensor:
    """How many bits of each non-negative int64 are set."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits + (bits >> 32)) & 0x7F
