"""What a step's and a chunk's body share: the victim, the maps, the merge and the mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from less_cache import ops
from less_cache.arrays import EMPTY, MAX_TOKENS, array_shapes
from less_cache.layer_config import LayerConfig
from less_cache.layer_maps import EXPONENT_LIMIT
from less_cache.policies import Start

from . import codes
from .building import Builder, Value

INT_MAX = int(np.iinfo(np.int32).max)

LATER = MAX_TOKENS
"""A position after every other. OpenVINO may compute a ``Where`` of int32 in float32, where the
largest int32 would become 2^31, and negative on the way back; this number stays what it is."""

Values = dict[str, Value]
"""A body's inputs, or a state, by the names of `less_cache.ops`."""


@dataclass(frozen=True)
class Layer:
    """What the bodies need to know of a layer.

    Parameters
    ----------
    config
        Of a layer whose heads have equal capacity, or of a run of such heads.
    kind
        The kind of its feature maps; ``None`` at rank 0.
    window
        How many tokens a query of a sliding-window layer sees, itself included; 0: all.
    code_dtype
        That of the bytes of codes in the bodies' inputs and outputs.
    """

    config: LayerConfig
    kind: str | None
    window: int = 0
    code_dtype: str = "uint8"

    @property
    def dtype(self) -> str:
        """The dtype of queries, keys and values: in the basis of codes they are not narrowed."""
        return self.config.dtype if self.config.quantization is None else self.wide

    @property
    def wide(self) -> str:
        """The dtype of scores and sums."""
        return self.config.score_dtype

    @property
    def lowest(self) -> float:
        """The logit of what is not seen. It is finite, so that a softmax over nothing is, too."""
        return float(np.finfo(self.wide).min)


def is_shifted(config: LayerConfig, kind: str | None) -> bool:
    """Whether queries come with what is added to their products, for the low-rank state to know."""
    quantization = config.quantization
    calibrated = quantization is not None and quantization.transform == "calibrated"
    return calibrated and kind is not None


def opened(b: Builder, layer: Layer, given: Values) -> Values:
    """The state that a body computes with, from its inputs."""
    state = {name: given[name] for name in ops.state_names(layer.config)}
    dtype = array_shapes(layer.config)["positions"][1]
    state["positions"] = b.cast(state["positions"], "int32", dtype)
    return state


def closed(b: Builder, layer: Layer, state: Values) -> list[Value]:
    """The body's outputs from the state that it computed."""
    dtype = array_shapes(layer.config)["positions"][1]
    state = {**state, "positions": b.cast(state["positions"], dtype, "int32")}
    return [state[name] for name in ops.state_names(layer.config)]


def as_stored(b: Builder, layer: Layer, k: Value, v: Value) -> Values:
    """What slots hold of pairs [B, Hkv, S, D]: these themselves, or codes and scales."""
    config, stored = layer.config, {"keys": k, "values": v}
    if config.key_layout is None or config.value_layout is None:
        return stored
    for name, layout in (("key", config.key_layout), ("value", config.value_layout)):
        found = codes.encode(b, layout, stored[f"{name}s"], layer.wide, layer.code_dtype)
        stored[f"{name}s"], stored[f"{name}_scales"] = found
    return stored


def as_read(b: Builder, layer: Layer, stored: Values) -> tuple[Value, Value]:
    """Keys and values [B, Hkv, N, D] of what slots hold."""
    config = layer.config
    if config.key_layout is None or config.value_layout is None:
        return stored["keys"], stored["values"]
    wide = layer.wide
    return (
        codes.decode(b, config.key_layout, stored["keys"], stored["key_scales"], wide),
        codes.decode(b, config.value_layout, stored["values"], stored["value_scales"], wide),
    )


def pair_widths(layer: Layer) -> dict[str, int]:
    """The arrays that hold pairs, and the size of their last axis; 0: they have none for it."""
    config = layer.config
    if config.key_layout is None or config.value_layout is None:
        return {"keys": config.head_dim, "values": config.head_dim}
    sizes = {"keys": config.key_layout.nbytes, "values": config.value_layout.nbytes}
    return {**sizes, "key_scales": 0, "value_scales": 0}


def pair_dtype(layer: Layer, name: str) -> str:
    """The dtype of one of `pair_widths`."""
    coded = layer.config.quantization is not None and name in ("keys", "values")
    return layer.code_dtype if coded else array_shapes(layer.config)[name][1]


def take_pairs(b: Builder, layer: Layer, state: Values, slots: Value) -> tuple[Value, Value]:
    """Keys and values [B, Hkv, N, D] in slots [B, Hkv, N]."""
    taken = {
        name: b.take(state[name], slots, size or None) for name, size in pair_widths(layer).items()
    }
    return as_read(b, layer, taken)


def protected(b: Builder, layer: Layer, positions: Value, seen: Value) -> Value:
    """[B, Hkv, N]: which pairs must stay when a token comes after `seen` [B, 1, 1] others."""
    policy = layer.config.policy
    first = b("Sub", seen, b.constant(policy.protected_recent, "int32"))
    recent = b("GreaterOrEqual", positions, first)
    if not policy.sinks:
        return recent
    return b("Or", recent, b("Less", positions, b.constant(policy.sinks, "int32")))


def choose_slot(b: Builder, layer: Layer, state: Values, seen: Value) -> Value:
    """[B, Hkv, 1] int64: the first empty slot, else the victim's."""
    positions = state["positions"]
    policy = layer.config.policy
    if not policy.evicts:
        return b("ArgMin", positions, axis=2)
    kept = protected(b, layer, positions, seen)
    last = b.constant(LATER, "int32")
    empty = b.constant(EMPTY, "int32")
    if policy.by_age:
        held = b("Greater", positions, empty)
        return b("ArgMin", b("Where", b("And", kept, held), last, positions), axis=2)
    infinity = b.constant(np.inf, layer.wide)
    ranked = b("Where", kept, infinity, state["scores"])
    least = b("ReduceMin", ranked, b.ints(2))
    # With an empty slot nothing leaves: no pair is ruled out then, and the empty slot has the
    # least position.
    room = b("Equal", b("ReduceMin", positions, b.ints(2)), empty)
    least = b("Where", room, infinity, least)
    return b("ArgMin", b("Where", b("Greater", ranked, least), last, positions), axis=2)


def initial_scores(
    b: Builder, layer: Layer, k: Value, positions: Value, *, spread: bool = True
) -> Value:
    """The first scores of new pairs, [B, Hkv, S] if `spread`; `positions` is [B, 1, S]."""
    config = layer.config
    if config.policy.starts is Start.POSITION:
        scores = b.cast(positions, layer.wide)
        return b("Expand", scores, b.ints(1, config.kv_heads, 1)) if spread else scores
    if config.policy.starts is Start.KEY_NORM:
        norm = b("ReduceL2", b.cast(k, layer.wide, layer.dtype), b.ints(3), keepdims=0)
        return b("Neg", norm)
    zero = b.constant(0, layer.wide)
    return b("Expand", zero, b("Shape", k, start=0, end=3)) if spread else zero


def phi(b: Builder, layer: Layer, maps: Values, q: Value, tokens: int | None = None) -> Value:
    """φ of queries [B, Hq, S, D]: [B, Hq, S, R]. `tokens` is S, if it is known."""
    weights = (maps["phi_w1"], maps["phi_w2"])
    features = _two_layers(b, layer, q, weights, layer.config.query_heads, tokens)
    if layer.kind == "exp":
        return _exponential(b, layer, features)
    return b("Abs", b("Gelu", features))


def psi(b: Builder, layer: Layer, maps: Values, k: Value, tokens: int | None = None) -> Value:
    """ψ of keys [B, Hkv, S, D]: [B, Hkv, S, R]. `tokens` is S, if it is known."""
    weights = (maps["psi_w1"], maps["psi_w2"])
    bias = maps.get("psi_b1")
    features = _two_layers(b, layer, k, weights, layer.config.kv_heads, tokens, bias)
    if layer.kind == "exp":
        return _exponential(b, layer, b("Add", features, b.unsqueeze(maps["psi_b"], 1)))
    s1, s2 = (b.unsqueeze(maps[name], 1) for name in ("psi_s1", "psi_s2"))
    u = b("Mul", b("Abs", s1), b("Gelu", features))
    return b("Abs", b("Add", u, b("Mul", b("MatMul", u, maps["psi_w3"]), s2)))


def merge(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    pairs: tuple[Value, Value],
    gone: Value,
    count: int | None = None,
) -> Values:
    """The state with H += ψ(k)ᵀ v and z += ψ(k) over those pairs [B, Hkv, N, D] that are `gone`.

    `count` is N, if it is known.
    """
    if layer.kind is None:
        return state
    config = layer.config
    keys, values = pairs
    gone = b.unsqueeze(gone, 3)
    # A slot from which nothing leaves may hold anything, and 0 * inf is not 0.
    zero = b.constant(0, layer.wide)
    features = b("Where", gone, psi(b, layer, maps, keys, count), zero)
    values = b("Where", gone, b.cast(values, layer.wide, layer.dtype), zero)
    gained = {
        "H": b("MatMul", b("Transpose", features, perm=[0, 1, 3, 2]), values),
        "z": b("ReduceSum", features, b.ints(2), keepdims=0),
    }
    merged = dict(state)
    for name, gain in gained.items():
        total = b("Add", b.cast(state[name], layer.wide, config.state_dtype), gain)
        merged[name] = b.cast(total, config.state_dtype, layer.wide)
    return merged


def pair_logits(b: Builder, layer: Layer, q: Value, keys: Value) -> Value:
    """q·k·scale, soft-capped where the model does so: [B, Hkv, G * S, N].

    The queries [B, Hq, S, D] are scaled before they are grouped by KV head. Next to the product,
    ONNX Runtime would fuse the scale into it, and so lose its fast kernel for a single query.
    bfloat16 is too coarse for the scale itself: there the logits are scaled.
    """
    coarse = layer.dtype == "bfloat16"
    grouped = grouped_queries(b, layer, q, scaled=not coarse)
    logits = b("MatMul", grouped, b("Transpose", keys, perm=[0, 1, 3, 2]))
    logits = b.cast(logits, layer.wide, layer.dtype)
    if coarse:
        logits = b("Mul", logits, b.constant(layer.config.scale, layer.wide))
    return capped(b, layer, logits)


def grouped_queries(b: Builder, layer: Layer, q: Value, *, scaled: bool = True) -> Value:
    """Queries [B, Hq, S, D] as [B, Hkv, G * S, D]."""
    config = layer.config
    if scaled:
        q = b("Mul", q, b.constant(config.scale, layer.dtype))
    return b.reshape(q, 0, config.kv_heads, -1, config.head_dim)


def capped(b: Builder, layer: Layer, logits: Value) -> Value:
    """The logits, soft-capped where the model does so."""
    if layer.config.softcap is None:
        return logits
    softcap = b.constant(layer.config.softcap, layer.wide)
    return b("Mul", b("Tanh", b("Div", logits, softcap)), softcap)


def pairs_mean(b: Builder, layer: Layer, probabilities: Value, values: Value) -> Value:
    """Σ probability · v, [B, Hkv, G * S, D], in the wide dtype."""
    weights = b.cast(probabilities, layer.dtype, layer.wide)
    return b.cast(b("MatMul", weights, values), layer.wide, layer.dtype)


def weighted_mean(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    q: Value,
    logits: Value,
    probabilities: Value,
    pairs: Value,
    shift: Value | None,
    tokens: int | None = None,
) -> Value:
    """(φ(q) H + Σ exp(s) v) / (φ(q) z + Σ exp(s)), [B, Hkv, G * S, D], s being the logits.

    Computed as a mean of two means, so that no exponential can overflow. `pairs` is the one over
    the pairs; `shift` [B, Hq, S] is added to the queries' products.
    """
    config = layer.config
    if layer.kind is None:
        return pairs
    features = b.reshape(phi(b, layer, maps, q, tokens), 0, config.kv_heads, -1, config.rank)
    H, z = (b.cast(state[name], layer.wide, config.state_dtype) for name in ("H", "z"))
    low_rank = b("MatMul", features, b.unsqueeze(z, 3))
    # The largest probability is exp(maximum) / Σ exp(s); the sum follows from it.
    log_peak = b("Log", b("ReduceMax", probabilities, b.ints(3)))
    log_mass = b("Sub", b("ReduceMax", logits, b.ints(3)), log_peak)
    if shift is not None:
        # Common to all pairs of a query, it only tells against the low-rank state.
        lift = b("Mul", shift, b.constant(config.scale, layer.wide))
        log_mass = b("Add", log_mass, b.reshape(lift, 0, config.kv_heads, -1, 1))
    # For an empty state this is log 0 = -inf: the pairs get all the weight.
    share = b("Sigmoid", b("Sub", log_mass, b("Log", low_rank)))
    tiny = b.constant(np.finfo(layer.wide).tiny, layer.wide)
    mean = b("Div", b("MatMul", features, H), b("Max", low_rank, tiny))
    rest = b("Sub", b.constant(1, layer.wide), share)
    return b("Add", b("Mul", pairs, share), b("Mul", mean, rest))


def persistent_bits(
    b: Builder, layer: Layer, share: Value, attended: Value, visible: Value
) -> Value:
    """1 where a pair had at least its fair share, 1/n, of a query's attention. int64."""
    fair = b("Mul", share, b.cast(attended, layer.wide))
    enough = b("GreaterOrEqual", fair, b.constant(1.0 - 1e-6, layer.wide))
    return b.cast(b("And", enough, visible), "int64")


def popcount(b: Builder, layer: Layer, bits: Value) -> Value:
    """How many bits of each non-negative int64 are set, as a score.

    Looked up eight bits at a time, since not every runtime has operators on bits.
    """
    table = b.constant([number.bit_count() for number in range(256)], layer.wide)
    counts = []
    for place in range(0, layer.config.policy.history_window, 8):
        rest = b("Div", bits, b.constant(2**place, "int64")) if place else bits
        byte = b("Mod", rest, b.constant(256, "int64"))
        counts.append(b("Gather", table, byte))
    total = counts[0]
    for count in counts[1:]:
        total = b("Add", total, count)
    return total


def _two_layers(
    b: Builder,
    layer: Layer,
    x: Value,
    weights: tuple[Value, Value],
    heads: int,
    tokens: int | None,
    bias: Value | None = None,
) -> Value:
    config = layer.config
    x, w1, w2 = (b.cast(value, layer.wide, layer.dtype) for value in (x, *weights))
    # Head by head for the whole batch: the weights are read once, not once a sequence.
    rows = b("Transpose", x, perm=[1, 0, 2, 3])
    flat = b.reshape(rows, heads, -1, config.head_dim)
    first = b("MatMul", flat, w1)
    if bias is not None:
        first = b("Add", first, b.unsqueeze(bias, 1))
    features = b("MatMul", b("Gelu", first), w2)
    if tokens is None:
        sizes = b("Shape", rows, start=1, end=3)
        back = b("Concat", b.ints(heads), sizes, b.ints(config.rank), axis=0)
    else:
        # One node instead of three. Each would take a tenth of a small product's time.
        back = b.ints(heads, -1, tokens, config.rank)
    return b("Transpose", b("Reshape", features, back), perm=[1, 0, 2, 3])


def _exponential(b: Builder, layer: Layer, exponent: Value) -> Value:
    limit = [b.constant(sign * EXPONENT_LIMIT, layer.wide) for sign in (-1, 1)]
    return b("Exp", b("Clip", exponent, *limit))
