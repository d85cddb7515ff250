"""What a decode step and a chunk of tokens share in the PyTorch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerConfig
from ..feature_maps import LayerMaps
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
    empty = positions == EMPTY
    if layer.policy.score is Score.NONE:
        return empty.to(torch.int32).argmax(2, keepdim=True)
    protected = protected_pairs(layer, positions, state.length)
    if layer.policy.score is Score.POSITION:
        # The score is the position itself: no ties, and one pass less.
        ranked = positions.masked_fill(protected & ~empty, torch.iinfo(positions.dtype).max)
        return ranked.argmin(2, keepdim=True)
    scores = state.scores.masked_fill(protected, INFINITY).masked_fill(empty, -INFINITY)
    ties = scores == scores.amin(2, keepdim=True)
    oldest = torch.where(ties, positions, torch.iinfo(positions.dtype).max)
    return oldest.argmin(2, keepdim=True)


def take_slot(array: Tensor, slot: Tensor) -> Tensor:
    """``array[b, h, slot]`` of [B, Hkv, C, D], as [B, Hkv, 1, D]."""
    return array.gather(2, slot.unsqueeze(3).expand(-1, -1, -1, array.shape[3]))


def merge(
    state: LayerState, maps: LayerMaps, keys: Tensor, values: Tensor, evicted: Tensor
) -> None:
    """H += ψ(k)ᵀ v and z += ψ(k) over the evicted pairs among those given, in place.

    Parameters
    ----------
    state
        H [B, Hkv, R, D] and z [B, Hkv, R] change.
    maps
        For ψ.
    keys, values
        [B, Hkv, N, D].
    evicted
        [B, Hkv, N], which of them leave.
    """
    features = maps.psi(keys).masked_fill(~evicted.unsqueeze(3), 0)
    # A slot that leaves nothing may hold anything, and 0 * inf is no 0.
    values = values.to(features.dtype).masked_fill(~evicted.unsqueeze(3), 0)
    if keys.shape[2] == 1:
        gained = features.transpose(2, 3) * values
    else:
        gained = features.transpose(2, 3) @ values
    state.H.copy_(state.H + gained)
    state.z.copy_(state.z + features.sum(2))


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
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Tensor,
    grouped: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """out = (φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), s = q·k·scale, under one maximum.

    Parameters
    ----------
    layer, state, maps
        Scale and softcap; H and z; φ.
    q
        [B, Hq, S, D], for φ.
    grouped
        The same queries as [B, Hkv, G * S, D], a group's heads one after another.
    keys, values
        [B, Hkv, N, D].
    bias
        Broadcast to [B, Hkv, G * S, N]: 0 where visible, -inf where not.

    Returns
    -------
    out
        [B, Hkv, G * S, D], in the scores' dtype.
    weights
        [B, Hkv, G * S, N], exp(s - maximum).
    mass
        [B, Hkv, G * S, 1], their sum over N: ``weights / mass`` is the softmax over the pairs.
    """
    wide = state.scores.dtype
    logits = pair_logits(layer, grouped, keys, wide).add_(bias)
    # Padding may see nothing at all; its row must stay finite, whatever it says.
    peak = logits.amax(3, keepdim=True).clamp_min_(torch.finfo(wide).min)
    weights = logits.sub_(peak).exp_()
    mass = weights.sum(3, keepdim=True)
    numerator = (weights.to(values.dtype) @ values).to(wide)
    if maps is None:
        return numerator / mass, weights, mass
    features = maps.phi(q).reshape(*grouped.shape[:3], -1)
    low_rank = features @ state.z.to(wide).unsqueeze(3)
    # Both sums carry exp(-maximum); the maximum must also cover log φ(q)z.
    excess = (low_rank.log() - peak).clamp_min_(0)
    shrink = torch.exp(-excess)
    lift = torch.exp(-peak - excess)
    numerator = numerator * shrink + (features @ state.H.to(wide)) * lift
    return numerator / (mass * shrink + low_rank * lift), weights, mass


def pair_logits(layer: LayerConfig, grouped: Tensor, keys: Tensor, wide: torch.dtype) -> Tensor:
    """q·k·scale, soft-capped where the model does so: [B, Hkv, G * S, N]."""
    logits = (grouped @ keys.transpose(2, 3)).to(wide).mul_(layer.scale)
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
