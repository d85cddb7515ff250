"""What a decode step and a chunk of tokens share: the victim, the merge, the mean, the bits."""

from __future__ import annotations

import array_api_compat.torch as torch_namespace
import torch
from torch import Tensor

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...policies import FAIR_SHARE, Start
from .slots import RunSlots

INFINITY = float("inf")


def protected_pairs(layer: LayerConfig, positions: Tensor, seen: Tensor) -> Tensor:
    """Which pairs the policy never evicts, when `seen` tokens came before the incoming one.

    Parameters
    ----------
    layer
        For the policy.
    positions
        [B, heads, N].
    seen
        [B].
    """
    policy = layer.policy
    recent = positions >= (seen - policy.protected_recent).view(-1, 1, 1)
    return recent | (positions < policy.sinks) if policy.sinks else recent


def choose_slot(layer: LayerConfig, slots: RunSlots, lengths: Tensor) -> Tensor:
    """The slot a new pair takes: the first empty one, else the victim's. [B, heads, 1] int64.

    Where the slots of all heads are as those of one, [B, 1, heads].
    """
    if slots.runs:
        windows = layer.policy.by_age and layer.policy.evicts
        if windows and len({policy.protected_recent for policy in layer.policies}) == 1:
            ranked = _ranked_by_position(layer, slots.positions, lengths)[:, 0]
            found = [
                ranked[:, run.slots].unflatten(1, (run.heads, -1)).argmin(2, keepdim=True)
                for run in slots.runs
            ]
        else:
            found = [choose_slot(run.layer, slots.of_run(run), lengths) for run in slots.runs]
        return (torch.cat(found, 1) + slots.first.unsqueeze(1)).transpose(1, 2)
    positions = slots.positions
    if not layer.policy.evicts:
        return positions.argmin(2, keepdim=True)
    if slots.scores is None or layer.policy.by_age:
        return _ranked_by_position(layer, positions, lengths).argmin(2, keepdim=True)
    protected = protected_pairs(layer, positions, lengths)
    ranked = slots.scores.masked_fill(protected, INFINITY)
    least = ranked.amin(2, keepdim=True)
    # Where a slot is empty, every pair may stay: the least position then is the empty slot's.
    least.masked_fill_(positions.amin(2, keepdim=True) == EMPTY, INFINITY)
    oldest = positions.masked_fill(ranked > least, torch.iinfo(positions.dtype).max)
    return oldest.argmin(2, keepdim=True)


def _ranked_by_position(layer: LayerConfig, positions: Tensor, lengths: Tensor) -> Tensor:
    """What leaves by age takes the least of: there are no ties."""
    held = positions != EMPTY
    protected = protected_pairs(layer, positions, lengths) & held
    return positions.masked_fill(protected, torch.iinfo(positions.dtype).max)


def merge(slots: RunSlots, features: Tensor, values: Tensor, evicted: Tensor) -> None:
    """H += ψ(k)ᵀ v and z += ψ(k) over the evicted pairs among those given, in place.

    Parameters
    ----------
    slots
        H [B, heads, R, D] and z [B, heads, R] change.
    features
        [B, heads, N, R], ψ of the pairs' keys.
    values
        [B, heads, N, D].
    evicted
        [B, heads, N], which of them leave.
    """
    stays = ~evicted.unsqueeze(3)
    features = features.masked_fill(stays, 0)
    # A slot that leaves nothing may hold anything, and 0 * inf is no 0.
    values = values.to(features.dtype).masked_fill(stays, 0)
    # In place, with sums in the features' dtype even where the state's is narrower.
    if values.shape[2] == 1:
        slots.H.addcmul_(features.transpose(2, 3), values)
        slots.z.add_(features.squeeze(2))
    else:
        slots.H.add_(features.transpose(2, 3) @ values)
        slots.z.add_(features.sum(2))


def initial_scores(layer: LayerConfig, k: Tensor, positions: Tensor, wide: torch.dtype) -> Tensor:
    """Scores that new pairs start from. [B, heads, S].

    Parameters
    ----------
    layer
        For the policy.
    k
        [B, heads, S, D].
    positions
        [B, heads, S].
    wide
        The scores' dtype.
    """
    starts = layer.policy.starts
    if starts is Start.POSITION:
        return positions.to(wide)
    if starts is Start.KEY_NORM:
        return -k.to(wide).norm(dim=3)
    if starts is Start.GIVEN:
        return layer.policy.initial_scores(torch_namespace, k.to(wide), positions)
    return torch.zeros(k.shape[:3], dtype=wide, device=k.device)


def with_low_rank(
    slots: RunSlots, features: Tensor, pairs_mean: Tensor, log_mass: Tensor
) -> Tensor:
    """Compute (φ(q) H + m Σ p v) / (φ(q) z + m), m = exp(log_mass) being the pairs' mass.

    Parameters
    ----------
    slots
        For H and z.
    features
        [B, heads, M, R], φ of the queries.
    pairs_mean
        [B, heads, M, D], Σ p v.
    log_mass
        [B, heads, M, 1], log Σ exp(s).
    """
    wide = pairs_mean.dtype
    low_rank = features @ slots.z.to(wide).unsqueeze(3)
    # A mean of two means: no exponential is left that could overflow. An empty state has
    # log 0 = -inf, and the pairs have all the weight.
    pairs_share = torch.sigmoid(log_mass - low_rank.log())
    low_rank_mean = (features @ slots.H.to(wide)) / low_rank.clamp_min(torch.finfo(wide).tiny)
    return torch.lerp(low_rank_mean, pairs_mean, pairs_share)


def log_mass_of(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Log Σ exp(s) of logits [..., N] whose softmax is known: [..., 1]."""
    # The largest probability is exp(maximum) / Σ exp(s), which gives the sum away.
    return logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()


def scaled(layer: LayerConfig, products: Tensor) -> Tensor:
    """Logits of products q·k, in place: times the scale, soft-capped where the model does so."""
    logits = products.mul_(layer.scale)
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
    return ((share * attended >= FAIR_SHARE) & visible).to(torch.int64)


def popcount(bits: Tensor) -> Tensor:
    """How many bits of each non-negative int64 are set."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits + (bits >> 32)) & 0x7F
