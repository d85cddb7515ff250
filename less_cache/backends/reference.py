"""The definition: one sequence and one KV head at a time, in the order of the paper's equations.

Written over the array API standard, so that NumPy in float64 (the oracle) and torch run the same
lines. Nothing here is fast, and nothing here is clever; every other backend must agree with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import torch

from ..config import CacheConfig, LayerConfig
from ..feature_maps import EXPONENT_LIMIT, LayerMaps
from ..policies import Policy, Score
from ..state import EMPTY, LayerState

Array = Any


def check_config(config: CacheConfig) -> None:
    """The reference runs everything."""


def prepare_maps(maps: LayerMaps, layer: LayerConfig, device: Any) -> LayerMaps:
    """The maps in the scores' dtype; NumPy arrays where there is no device."""
    wide = maps.to(device, getattr(torch, layer.score_dtype))
    if device is not None:
        return wide
    arrays: dict[str, Any] = {name: t.detach().numpy() for name, t in wide.tensors.items()}
    return LayerMaps(maps.kind, arrays)


@dataclass
class Head:
    """What one KV head of one sequence holds: n pairs, and the state of what it has lost."""

    keys: Array
    """[n, D]"""
    values: Array
    """[n, D]"""
    scores: Array
    """[n]"""
    positions: Array
    """[n]"""
    history: Array
    """[n]"""
    H: Array
    """[R, D]"""
    z: Array
    """[R]"""

    def keep(self, slots: Array) -> Head:
        """The same head with only these pairs."""
        return Head(
            self.keys[slots],
            self.values[slots],
            self.scores[slots],
            self.positions[slots],
            self.history[slots],
            self.H,
            self.z,
        )


def append(
    layer: LayerConfig,
    state: LayerState,
    maps: LayerMaps | None,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
) -> Array:
    """`CacheManager.append` for one layer; see `Backend.append`."""
    xp = array_api_compat.array_namespace(q)
    wide = xp.float64 if layer.score_dtype == "float64" else xp.float32
    out = xp.zeros_like(q)
    group = layer.group
    for row in range(q.shape[0]):
        tokens = slice(None) if mask is None else mask[row]
        seen = int(state.length[row])
        if mask is not None and not bool(xp.any(mask[row])):
            continue
        for head in range(layer.kv_heads):
            queries = slice(head * group, (head + 1) * group)
            weights = None if maps is None else _head_maps(maps, queries, head)
            held = _read(xp, state, row, head, wide)
            attended, held = append_head(
                xp,
                layer,
                held,
                weights,
                xp.astype(q[row, queries][:, tokens], wide),
                xp.astype(k[row, head][tokens], wide),
                xp.astype(v[row, head][tokens], wide),
                seen,
            )
            out[row, queries][:, tokens] = xp.astype(attended, q.dtype)
            _write(xp, state, row, head, held)
        state.length[row] = seen + k[row, 0][tokens].shape[0]
    return out


def append_head(
    xp: Any,
    layer: LayerConfig,
    held: Head,
    maps: dict[str, Any] | None,
    q: Array,
    k: Array,
    v: Array,
    seen: int,
) -> tuple[Array, Head]:
    """One KV head of one sequence takes S >= 1 new tokens, none of them padding.

    Parameters
    ----------
    xp
        The arrays' namespace.
    layer
        Capacity, policy, scale.
    held
        What the head holds.
    maps
        This head's φ and ψ (see `_head_maps`), or ``None`` for rank 0.
    q
        [G, S, D].
    k, v
        [S, D].
    seen
        Tokens seen before these.

    Returns
    -------
    out
        [G, S, D].
    held
        What the head holds now.
    """
    policy = layer.policy
    new_tokens = k.shape[0]

    # 1. Make room for the incoming token.
    if held.keys.shape[0] == layer.capacity and policy.score is not Score.NONE:
        held = evict(xp, layer, held, maps, seen)

    # 2. Attend over the pairs kept, the new pairs up to the query itself, and the low-rank state.
    kept = held.keys.shape[0]
    device = array_api_compat.device(k)
    new = xp.arange(new_tokens, dtype=held.positions.dtype, device=device)
    union = Head(
        xp.concat([held.keys, k]),
        xp.concat([held.values, v]),
        xp.concat([held.scores, policy.initial_scores(xp, k, seen + new)]),
        xp.concat([held.positions, seen + new]),
        xp.concat([held.history, xp.zeros_like(new, dtype=held.history.dtype)]),
        held.H,
        held.z,
    )
    columns = xp.arange(kept + new_tokens, device=device)
    visible = columns[None, :] <= kept + new[:, None]
    logits = (q @ xp.matrix_transpose(union.keys)) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * xp.tanh(logits / layer.softcap)
    logits = xp.where(visible, logits, -math.inf)
    peak = xp.max(logits, axis=-1, keepdims=True)
    if maps is not None:
        features = phi(xp, maps, q)
        low_rank = features @ union.z[:, None]
        # The running maximum also covers log φ(q)z; a zero must not reach the logarithm.
        tiny = xp.where(low_rank > 0, low_rank, xp.ones_like(low_rank))
        peak = xp.where(low_rank > 0, xp.maximum(peak, xp.log(tiny)), peak)
        # An empty state adds nothing, and must not meet an exp(-peak) that overflows.
        lift = xp.exp(xp.where(low_rank > 0, -peak, xp.full_like(peak, -math.inf)))
    weights = xp.exp(logits - peak)
    pairs_mass = xp.sum(weights, axis=-1, keepdims=True)
    numerator = weights @ union.values
    denominator = pairs_mass
    if maps is not None:
        numerator = numerator + (features @ union.H) * lift
        denominator = denominator + low_rank * lift
    out = numerator / denominator

    # 3. Scores, from the softmax over the kept pairs alone.
    pairs_only = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    probabilities = pairs_only / xp.sum(pairs_only, axis=-1, keepdims=True)
    union.scores, union.history = policy.update(
        xp, union.scores, union.history, probabilities, visible
    )

    # 4. The new pairs are in; while more than C are held, evict one.
    while union.keys.shape[0] > layer.capacity:
        union = evict(xp, layer, union, maps, seen + new_tokens)
    return out, union


def evict(xp: Any, layer: LayerConfig, held: Head, maps: dict[str, Any] | None, seen: int) -> Head:
    """Merge the unprotected pair with the least (score, position) into H and z, and drop it."""
    slot = victim(xp, layer.policy, held.scores, held.positions, seen)
    slots = xp.arange(held.keys.shape[0], device=array_api_compat.device(held.keys))
    others = slots != slot
    left = held.keep(others)
    if maps is not None:
        features = psi(xp, maps, held.keys[slot, :][None, :])
        left.H = held.H + xp.matrix_transpose(features) @ held.values[slot, :][None, :]
        left.z = held.z + features[0, :]
    return left


def victim(xp: Any, policy: Policy, scores: Array, positions: Array, seen: int) -> int:
    """The slot of the unprotected pair with the least (score, position).

    Parameters
    ----------
    xp
        The arrays' namespace.
    policy
        Says which positions are protected.
    scores, positions
        [n], of the pairs held.
    seen
        Tokens seen before the incoming one: the last `policy.recent` of them are protected.
    """
    protected = (positions < policy.sinks) | (positions >= seen - policy.protected_recent)
    scores = xp.where(protected, xp.full_like(scores, math.inf), scores)
    ties = scores == xp.min(scores)
    oldest = xp.where(ties, positions, xp.full_like(positions, seen))
    return int(xp.argmin(oldest))


def phi(xp: Any, maps: dict[str, Any], q: Array) -> Array:
    """φ of queries [G, S, D], as the docstring of `feature_maps` gives it: [G, S, R]."""
    features = gelu(xp, q @ maps["phi_w1"]) @ maps["phi_w2"]
    if maps["kind"] == "exp":
        return xp.exp(xp.clip(features, -EXPONENT_LIMIT, EXPONENT_LIMIT))
    return xp.abs(gelu(xp, features))


def psi(xp: Any, maps: dict[str, Any], k: Array) -> Array:
    """ψ of keys [S, D], as the docstring of `feature_maps` gives it: [S, R]."""
    features = gelu(xp, k @ maps["psi_w1"]) @ maps["psi_w2"]
    if maps["kind"] == "exp":
        return xp.exp(xp.clip(features + maps["psi_b"], -EXPONENT_LIMIT, EXPONENT_LIMIT))
    u = xp.abs(maps["psi_s1"]) * gelu(xp, features)
    return xp.abs(u + (u @ maps["psi_w3"]) * maps["psi_s2"])


def gelu(xp: Any, x: Array) -> Array:
    """Compute x Φ(x), Φ the normal distribution function: the exact form, not the tanh one."""
    scaled = x / math.sqrt(2.0)
    if isinstance(x, torch.Tensor):
        erf = torch.erf(scaled)
    else:
        # The array API has no erf; the standard library's is exact to the last digit.
        erf = xp.asarray(np.vectorize(math.erf, otypes=[x.dtype])(scaled))
    return x * 0.5 * (1.0 + erf)


def _head_maps(maps: LayerMaps, queries: slice, head: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {"kind": maps.kind}
    for name, tensor in maps.tensors.items():
        chosen[name] = tensor[queries] if name.startswith("phi") else tensor[head]
    return chosen


def _read(xp: Any, state: LayerState, row: int, head: int, wide: Any) -> Head:
    positions = state.positions[row, head]
    held = positions != EMPTY
    history = xp.zeros_like(positions, dtype=xp.int64)
    if state.history is not None:
        history = state.history[row, head]
    return Head(
        xp.astype(state.keys[row, head], wide),
        xp.astype(state.values[row, head], wide),
        state.scores[row, head],
        positions,
        history,
        xp.astype(state.H[row, head], wide),
        xp.astype(state.z[row, head], wide),
    ).keep(held)


def _write(xp: Any, state: LayerState, row: int, head: int, held: Head) -> None:
    count = held.keys.shape[0]
    for name in ("keys", "values", "scores", "positions", "history"):
        slots = getattr(state, name)
        if slots is not None:
            slots[row, head, :count] = xp.astype(getattr(held, name), slots.dtype)
            slots[row, head, count:] = EMPTY if name == "positions" else 0
    state.H[row, head] = xp.astype(held.H, state.H.dtype)
    state.z[row, head] = xp.astype(held.z, state.z.dtype)
