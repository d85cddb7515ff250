"""Several new tokens at once, as `less_cache.backends.torch.chunk` takes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from less_cache.arrays import EMPTY
from less_cache.policies import Gain

from .blocks import attend_in_blocks
from .building import Builder, Value
from .parts import (
    INT_MAX,
    LATER,
    Layer,
    Values,
    as_read,
    as_stored,
    choose_slot,
    closed,
    initial_scores,
    merge,
    opened,
    pair_dtype,
    pair_logits,
    pair_widths,
    persistent_bits,
    popcount,
    protected,
    take_pairs,
)


def chunk_body(
    b: Builder,
    layer: Layer,
    given: Values,
    opset: int,
    attend: Callable[..., tuple[Value, Value | None]] = attend_in_blocks,
) -> list[Value]:
    """The output [B, Hq, S, D] and the new state, which must not share memory with the old one.

    Parameters
    ----------
    b
        Gets the nodes.
    layer
        Shapes, policy and maps' kind.
    given
        The inputs, by the names of `nodes.node_inputs`.
    opset
        The opset of the loop over blocks of queries.
    attend
        `attend_in_blocks`, or another function that does the same.
    """
    config, policy = layer.config, layer.config.policy
    state = opened(b, layer, given)
    tokens = b.cast(given["mask"], "bool")
    tokens4 = b.unsqueeze(tokens, 1, 3)
    # Padding may hold NaN, which adding the lowest number would not hide.
    blank = b.constant(0, layer.dtype)
    q, k, v = (b("Where", tokens4, given[name], blank) for name in ("q", "k", "v"))
    ones = b.cast(tokens, "int32")
    ranks = b("CumSum", ones, b.constant(1, "int64"))
    incoming = b.unsqueeze(b("ReduceSum", ones, b.ints(1)), 2)
    seen = b.unsqueeze(given["length"], 1, 2)

    # 1. Make room for the first incoming token.
    state = _evict_one(b, layer, state, given, seen, incoming)

    # 2. Attend over the pairs kept and the new ones.
    last = b("Add", b.unsqueeze(given["length"], 1), b("Sub", ranks, b.constant(1, "int32")))
    new_positions = b.unsqueeze(b("Where", tokens, last, b.constant(EMPTY, "int32")), 1)
    if config.keeps_scores:
        first = initial_scores(b, layer, k, new_positions)
    new_positions = b("Expand", new_positions, b.ints(1, config.kv_heads, 1))
    # Their own step reads new pairs as they came, not as they are stored.
    read = [b("Concat", *x, axis=2) for x in zip(as_read(b, layer, state), (k, v), strict=True)]
    new = {**as_stored(b, layer, k, v), "positions": new_positions}
    for name, array in new.items():
        state[name] = b("Concat", state[name], array, axis=2)
    union = {**state, "keys": read[0], "values": read[1]}
    weight = None
    if policy.gains is Gain.SUM:
        weight = _query_weights(b, layer, ones, ranks, incoming)
    out, gained = attend(b, layer, union, given, q, given.get("shift"), weight, opset=opset)
    out = b("Where", tokens4, out, blank)

    # 3. Scores.
    if policy.gains is Gain.HISTORY:
        state["history"] = _history(b, layer, union, q, ranks, incoming)
        state["scores"] = popcount(b, layer, state["history"])
    elif config.keeps_scores:
        scores = b("Concat", state["scores"], first, axis=2)
        if gained is not None:
            if policy.decay != 1:
                scores = b("Mul", scores, _faded(b, layer, incoming))
            if policy.pool > 1:
                several = b("Greater", incoming, b.constant(1, "int32"))
                gained = b("Where", several, _pooled(b, layer, state, gained), gained)
            scores = b("Add", scores, gained)
        state["scores"] = scores

    # 4. The new pairs are in; all but C leave.
    state = _keep(b, layer, state, given, b("Add", seen, incoming))
    return [out, *closed(b, layer, state)]


def _evict_one(
    b: Builder, layer: Layer, state: Values, maps: Values, seen: Value, incoming: Value
) -> Values:
    """If a row is full and has new tokens, its victim leaves and the slot becomes empty."""
    config = layer.config
    if not config.policy.evicts:
        return state
    slot = choose_slot(b, layer, state, seen)
    position = b.take(state["positions"], slot)
    held = b("Greater", position, b.constant(EMPTY, "int32"))
    gone = b("And", held, b("Greater", incoming, b.constant(0, "int32")))
    if layer.kind is not None:
        state = merge(b, layer, state, maps, take_pairs(b, layer, state, slot), gone)
    left = b("Where", gone, b.constant(EMPTY, "int32"), position)
    return {**state, "positions": b.put(state["positions"], slot, left)}


def _query_weights(b: Builder, layer: Layer, ones: Value, ranks: Value, incoming: Value) -> Value:
    """[B, S], what each query's probabilities count for: the decay to the power of its age."""
    policy = layer.config.policy
    weight = b.cast(ones, layer.wide)
    if policy.decay == 1 and policy.counted is None:
        return weight
    age = b("Sub", b("Squeeze", incoming, b.ints(2)), ranks)
    if policy.decay != 1:
        weight = b("Mul", weight, _faded(b, layer, age))
    if policy.counted is not None:
        counts = b("Less", age, b.constant(policy.counted, "int32"))
        weight = b("Where", counts, weight, b.constant(0, layer.wide))
    return weight


def _pooled(b: Builder, layer: Layer, state: Values, gained: Value) -> Value:
    """The mean of [B, Hkv, N] over `Policy.pool` held pairs, neighbours in order of position."""
    neighbours = layer.config.policy.pool
    reach = neighbours // 2
    order = _order(b, state["positions"], b.dim(state["positions"], 2))
    # Empty slots come first and gained nothing: like the zeros beyond the ends.
    ordered = b.take(gained, order)
    start, axis = b.ints(0), b.ints(2)
    edge = b("Mul", b("Slice", ordered, start, b.ints(1), axis), b.constant(0, layer.wide))
    padded = b("Concat", *[edge] * reach, ordered, *[edge] * reach, axis=2)
    total = b("Slice", padded, start, b.ints(1 - neighbours), axis)
    for shift in range(1, neighbours):
        end = shift + 1 - neighbours
        part = b("Slice", padded, b.ints(shift), b.ints(end or INT_MAX), axis)
        total = b("Add", total, part)
    mean = b("Div", total, b.constant(neighbours, layer.wide))
    return b.put(gained, order, mean)


def _faded(b: Builder, layer: Layer, age: Value) -> Value:
    """The decay to the power of an age in tokens."""
    decay = b.constant(layer.config.policy.decay, layer.wide)
    return b("Pow", decay, b.cast(age, layer.wide))


def _history(
    b: Builder, layer: Layer, state: Values, q: Value, ranks: Value, incoming: Value
) -> Value:
    """[B, Hkv, N] int64: each pair's bits after the new queries; only the last few count."""
    config = layer.config
    window, group = config.policy.history_window, config.group
    # Ranks of the last real queries, oldest first; numbers below 1 where a row has fewer.
    back = b.constant(np.arange(window - 1, -1, -1), "int32")
    wanted = b("Sub", b("Squeeze", incoming, b.ints(2)), back)
    below = b("Less", b.unsqueeze(ranks, 1), b.unsqueeze(wanted, 2))
    column = b("ReduceSum", b.cast(below, "int64"), b.ints(2), keepdims=0)
    column = b("Min", column, b("Sub", b.dim(q, 2), b.ints(1)))
    index = b("Expand", b.unsqueeze(column, 1, 3), b.ints(1, config.query_heads, 1, 1))
    index = b("Expand", index, b.ints(1, 1, 1, config.head_dim))
    queries = b("GatherElements", q, index, axis=2)
    logits = pair_logits(b, layer, queries, state["keys"])
    span = b.dim(state["positions"], 2)
    split = b("Concat", b.ints(0, 0, group, window), span, axis=0)
    logits = b("Reshape", logits, split)
    place = b("Range", b.constant(0, "int64"), b("Squeeze", span), b.constant(1, "int64"))
    place = b("Sub", place, b.constant(config.capacity, "int64"))
    past = b("LessOrEqual", place, b.unsqueeze(column, 1, 3))
    held = b("Greater", state["positions"], b.constant(EMPTY, "int32"))
    visible = b("And", b.unsqueeze(held, 2), past)
    hidden = b.constant(layer.lowest, layer.wide)
    share = b("Softmax", b("Where", b.unsqueeze(visible, 2), logits, hidden), axis=-1)
    share = b("ReduceMean", share, b.ints(2), keepdims=0)
    attended = b("ReduceSum", b.cast(visible, "int32"), b.ints(3))
    bits = persistent_bits(b, layer, share, attended, visible)
    real = b.cast(b("Greater", wanted, b.constant(0, "int32")), "int64")
    worth = b.constant(2 ** np.arange(window - 1, -1, -1, dtype=np.int64), "int64")
    weights = b.unsqueeze(b("Mul", real, worth), 1, 3)
    recent = b("ReduceSum", b("Mul", bits, weights), b.ints(2), keepdims=0)
    # Bits beyond the window fall off before the rest are shifted: nothing overflows.
    places = b("Min", incoming, b.constant(window, "int32"))
    powers = 2 ** np.arange(window + 1, dtype=np.int64)
    room = b("Gather", b.constant(powers[::-1], "int64"), places)
    shift = b("Gather", b.constant(powers, "int64"), places)
    old = b("Mul", b("Mod", state["history"], room), shift)
    zeros = b("Expand", b.constant(0, "int64"), b("Shape", state["positions"]))
    zeros = b("Slice", zeros, b.ints(config.capacity), b.ints(INT_MAX), b.ints(2))
    return b("Add", b("Concat", old, zeros, axis=2), recent)


def _keep(b: Builder, layer: Layer, state: Values, maps: Values, total: Value) -> Values:
    """The state with C pairs; the others leave, in order of (protected, score, position).

    No pair's score changes while pairs leave one by one, so one sort finds them all.
    """
    config = layer.config
    positions = state["positions"]
    span = b.dim(positions, 2)
    capacity = b.ints(config.capacity)
    empty = b("Less", positions, b.constant(0, "int32"))
    kept = protected(b, layer, positions, total)
    scores = state.get("scores")
    if scores is None:
        scores = initial_scores(b, layer, state["keys"], positions, spread=False)
    ranked = b("Where", kept, b.constant(np.inf, layer.wide), scores)
    ranked = b("Where", empty, b.constant(-np.inf, layer.wide), ranked)
    by_age = _order(b, positions, span)
    by_score = _order(b, b.take(ranked, by_age), span)
    order = b.take(by_age, by_score)
    cut = b("Sub", span, capacity)
    staying = b("Slice", order, cut, span, b.ints(2))
    if layer.kind is not None:
        leaving = b("Slice", order, b.ints(0), cut, b.ints(2))
        gone = b("Greater", b.take(positions, leaving), b.constant(EMPTY, "int32"))
        state = merge(b, layer, state, maps, take_pairs(b, layer, state, leaving), gone)
    # Oldest first, empty slots last: an order that does not depend on the padding.
    age = b.take(positions, staying)
    age = b("Where", b("Less", age, b.constant(0, "int32")), b.constant(LATER, "int32"), age)
    staying = b.take(staying, _order(b, age, capacity))
    held = dict(state)
    held["positions"] = b.take(positions, staying)
    empty = b("Less", held["positions"], b.constant(0, "int32"))
    empty4 = b.unsqueeze(empty, 3)
    for name, size in pair_widths(layer).items():
        blank = b.constant(0, pair_dtype(layer, name))
        taken = b.take(state[name], staying, size or None)
        held[name] = b("Where", empty4 if size else empty, blank, taken)
    if config.keeps_scores:
        kept = b.take(state["scores"], staying)
        held["scores"] = b("Where", empty, b.constant(0, layer.wide), kept)
    if "history" in state:
        bits = b.take(state["history"], staying)
        held["history"] = b("Where", empty, b.constant(0, "int64"), bits)
    return held


def _order(b: Builder, array: Value, size: Value) -> Value:
    """Indices that sort along the slots; equal numbers keep their order."""
    return b.many("TopK", [array, size], 2, axis=2, largest=0, sorted=1)[1]
