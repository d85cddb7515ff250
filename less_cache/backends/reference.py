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

from ..arrays import EMPTY, PAIRS, LayerArrays
from ..config import CacheConfig
from ..layer_config import LayerConfig
from ..layer_maps import EXPONENT_LIMIT, LayerMaps
from ..policies import Policy
from ..quantization import codes
from . import following

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
    """[n, D], as attention reads them"""
    values: Array
    """[n, D]"""
    stored: dict[str, Array]
    """What the slots hold of keys and values, [n, ...] each: these themselves, or codes"""
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
            {name: array[slots] for name, array in self.stored.items()},
            self.scores[slots],
            self.positions[slots],
            self.history[slots],
            self.H,
            self.z,
        )


def attend(
    layer: LayerConfig,
    arrays: LayerArrays,
    maps: LayerMaps | None,
    q: Array,
    k: Array,
    v: Array,
    *,
    lengths: Array,
    rows: Array | None = None,
    mask: Array | None = None,
    clean: bool = False,
    shift: Array | None = None,
) -> Array:
    """The step; see `Backend.attend`."""
    with torch.no_grad():
        xp = array_api_compat.array_namespace(q)
        wide = xp.float64 if layer.score_dtype == "float64" else xp.float32
        out = xp.zeros_like(q)
        group = layer.group
        for number in range(q.shape[0]):
            tokens = slice(None) if mask is None else mask[number]
            if mask is not None and not bool(xp.any(mask[number])):
                continue
            row = number if rows is None else int(rows[number])
            seen = int(lengths[number])
            for head in range(layer.kv_heads):
                queries = slice(head * group, (head + 1) * group)
                weights = None if maps is None else _head_maps(maps, queries, head)
                held = _read(xp, layer, arrays, row, head, wide, empty=seen == 0)
                attended, held = attend_head(
                    xp,
                    layer,
                    head,
                    held,
                    weights,
                    xp.astype(q[number, queries][:, tokens], wide),
                    xp.astype(k[number, head][tokens], wide),
                    xp.astype(v[number, head][tokens], wide),
                    seen,
                    None if shift is None else shift[number, queries][:, tokens],
                )
                out[number, queries][:, tokens] = xp.astype(attended, q.dtype)
                _write(xp, layer, arrays, row, head, held)
        return out


def eviction_times(
    layer: LayerConfig, q: Array, k: Array, mask: Array | None, *, prompt: int
) -> Array:
    """When each pair leaves; see `Backend.eviction_times`."""
    return following.eviction_times(attend, layer, q, k, mask, prompt=prompt)


def attend_head(
    xp: Any,
    layer: LayerConfig,
    head: int,
    held: Head,
    maps: dict[str, Any] | None,
    q: Array,
    k: Array,
    v: Array,
    seen: int,
    shift: Array | None = None,
) -> tuple[Array, Head]:
    """One KV head of one sequence takes S >= 1 new tokens, none of them padding.

    Parameters
    ----------
    xp
        The arrays' namespace.
    layer
        Scale and softcap.
    head
        Which KV head, for its capacity and policy.
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
    shift
        [G, S], added to each query's products.

    Returns
    -------
    out
        [G, S, D].
    held
        What the head holds now.
    """
    policy, capacity = layer.policies[head], layer.capacities[head]
    new_tokens = k.shape[0]

    # 1. Make room for the incoming token.
    if held.keys.shape[0] == capacity and policy.evicts:
        held = evict(xp, policy, held, maps, seen)

    # 2. Attend over the pairs kept, the new pairs up to the query itself, and the low-rank state.
    kept = held.keys.shape[0]
    device = array_api_compat.device(k)
    new = xp.arange(new_tokens, dtype=held.positions.dtype, device=device)
    entering = _as_stored(xp, layer, k, v)
    union = Head(
        xp.concat([held.keys, k]),
        xp.concat([held.values, v]),
        {name: xp.concat([held.stored[name], entering[name]]) for name in entering},
        xp.concat([held.scores, policy.initial_scores(xp, k, seen + new)]),
        xp.concat([held.positions, seen + new]),
        xp.concat([held.history, xp.zeros_like(new, dtype=held.history.dtype)]),
        held.H,
        held.z,
    )
    columns = xp.arange(kept + new_tokens, device=device)
    visible = columns[None, :] <= kept + new[:, None]
    products = q @ xp.matrix_transpose(union.keys)
    logits = (products if shift is None else products + shift[..., None]) * layer.scale
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
    numerator = weigh_visible(xp, weights, union.values, kept)
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

    # 4. The new pairs are in, as they are stored; while more than C are held, evict one.
    union.keys, union.values = _as_read(xp, layer, union.stored, k.dtype)
    while union.keys.shape[0] > capacity:
        union = evict(xp, policy, union, maps, seen + new_tokens)
    return out, union


def _as_stored(xp: Any, layer: LayerConfig, k: Array, v: Array) -> dict[str, Array]:
    """What slots hold of new pairs: in the dtype of storing, or codes and scales."""
    if layer.key_layout is None or layer.value_layout is None:
        dtype = getattr(xp, layer.dtype)
        return {"keys": xp.astype(k, dtype), "values": xp.astype(v, dtype)}
    return codes.encode_pairs(layer.key_layout, layer.value_layout, k, v)


def _as_read(
    xp: Any, layer: LayerConfig, stored: dict[str, Array], dtype: Any
) -> tuple[Array, Array]:
    """Keys and values as attention reads them from what slots hold."""
    if layer.key_layout is None or layer.value_layout is None:
        return xp.astype(stored["keys"], dtype), xp.astype(stored["values"], dtype)
    return codes.decode_pairs(layer.key_layout, layer.value_layout, stored, dtype)


def weigh_visible(xp: Any, weights: Array, values: Array, kept: int) -> Array:
    """[G, S, D], Σ weight · v over the `kept` pairs and the new ones up to each query.

    `weights` [G, S, N] are zero beyond; a value there that is no number must stay there as well.
    """
    if bool(xp.all(xp.isfinite(values))):
        return weights @ values
    seen = [kept + query + 1 for query in range(weights.shape[1])]
    return xp.stack(
        [weights[:, query, :columns] @ values[:columns] for query, columns in enumerate(seen)],
        axis=1,
    )


def evict(xp: Any, policy: Policy, held: Head, maps: dict[str, Any] | None, seen: int) -> Head:
    """Merge the unprotected pair with the least (score, position) into H and z, and drop it."""
    slot = victim(xp, policy, held.scores, held.positions, seen)
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
    first = k @ maps["psi_w1"]
    if "psi_b1" in maps:
        first = first + maps["psi_b1"]
    features = gelu(xp, first) @ maps["psi_w2"]
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


def _read(
    xp: Any,
    layer: LayerConfig,
    arrays: LayerArrays,
    row: int,
    head: int,
    wide: Any,
    *,
    empty: bool,
) -> Head:
    """What a head holds, in order of position; nothing where the row is `empty`."""
    slots = layer.head_slots(head)
    positions = xp.astype(arrays.positions[row, slots], xp.int32)
    H, z = (xp.astype(array[row, head], wide) for array in (arrays.H, arrays.z))
    if empty:
        positions = xp.full_like(positions, EMPTY)
        H, z = xp.zeros_like(H), xp.zeros_like(z)
    history = xp.zeros_like(positions, dtype=xp.int64)
    if arrays.history is not None:
        history = arrays.history[row, slots]
    order = xp.argsort(positions)
    order = order[positions[order] != EMPTY]
    stored = {
        name: getattr(arrays, name)[row, slots]
        for name in PAIRS
        if getattr(arrays, name) is not None
    }
    keys, values = _as_read(xp, layer, stored, wide)
    if arrays.scores is None:
        scores = layer.policy.initial_scores(xp, keys, positions)
    else:
        scores = arrays.scores[row, slots]
    return Head(
        keys,
        values,
        stored,
        scores,
        positions,
        history,
        H,
        z,
    ).keep(order)


def _write(
    xp: Any, layer: LayerConfig, arrays: LayerArrays, row: int, head: int, held: Head
) -> None:
    count = held.keys.shape[0]
    slots = layer.head_slots(head)
    small = {"scores": held.scores, "positions": held.positions, "history": held.history}
    for name, new in {**held.stored, **small}.items():
        array = getattr(arrays, name)
        if array is not None:
            own = array[row, slots]
            own[:count] = xp.astype(new, array.dtype)
            own[count:] = EMPTY if name == "positions" else 0
    arrays.H[row, head] = xp.astype(held.H, arrays.H.dtype)
    arrays.z[row, head] = xp.astype(held.z, arrays.z.dtype)
