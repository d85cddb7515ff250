"""One new token of each sequence, as `less_cache.backends.torch.step` takes it."""

from __future__ import annotations

from less_cache.arrays import EMPTY
from less_cache.policies import Gain, Start

from . import codes
from .building import Builder, Value
from .parts import (
    Layer,
    Values,
    as_read,
    as_stored,
    capped,
    choose_slot,
    closed,
    grouped_queries,
    initial_scores,
    merge,
    opened,
    pair_logits,
    pair_widths,
    pairs_mean,
    persistent_bits,
    popcount,
    weighted_mean,
)


def step_body(b: Builder, layer: Layer, given: Values) -> list[Value]:
    """The output [B, Hq, 1, D] and the new state.

    A new array may take the memory of the old one: a single node writes it, and that node depends
    on everything that reads the old one.

    Parameters
    ----------
    b
        Gets the nodes.
    layer
        Shapes, policy and maps' kind.
    given
        The inputs, by the names of `nodes.node_inputs`.
    """
    config, policy = layer.config, layer.config.policy
    state = opened(b, layer, given)
    incoming = b.unsqueeze(b.cast(given["mask"], "bool"), 2)
    seen = b.unsqueeze(given["length"], 1, 2)

    # 1. Make room. An empty slot counts as a victim that leaves nothing behind.
    slot = choose_slot(b, layer, state, seen)
    row = _row(b, config.kv_heads, slot)
    old = {name: b.unsqueeze(b("GatherND", state[name], row), 2) for name in pair_widths(layer)}
    old_position = b.take(state["positions"], slot)
    held = b("Greater", old_position, b.constant(EMPTY, "int32"))
    if layer.kind is not None:
        gone = b("And", held, incoming)
        state = merge(b, layer, state, given, as_read(b, layer, old), gone, 1)

    # 4, before 2: the pair goes in first, so that a query sees itself like any other pair.
    incoming4 = b.unsqueeze(incoming, 3)
    new = as_stored(b, layer, given["k"], given["v"])
    for name, size in pair_widths(layer).items():
        has = incoming4 if size else incoming
        pair = b("Squeeze", b("Where", has, new[name], old[name]), b.ints(2))
        state[name] = b("ScatterND", state[name], row, pair)
    state["positions"] = b.put(state["positions"], slot, b("Where", incoming, seen, old_position))
    if config.keeps_scores and (policy.starts is not Start.ZERO or policy.gains is not Gain.NONE):
        first = initial_scores(b, layer, given["k"], seen, spread=False)
        old_score = b.take(state["scores"], slot)
        state["scores"] = b.put(state["scores"], slot, b("Where", incoming, first, old_score))
    if policy.history_window:
        none = b("Where", incoming, b.constant(0, "int64"), b.take(state["history"], slot))
        state["history"] = b.put(state["history"], slot, none)

    # 2. Attend.
    coded = config.quantization is not None
    if coded:
        logits = _coded_logits(b, layer, state, given, slot)
    else:
        logits = pair_logits(b, layer, given["q"], state["keys"])
    empty = b("Less", state["positions"], b.constant(0, "int32"))
    logits = b("Where", b.unsqueeze(empty, 2), b.constant(layer.lowest, layer.wide), logits)
    probabilities = b("Softmax", logits, axis=-1)
    if coded:
        pairs = _coded_mean(b, layer, state, given["v"], probabilities, slot)
    else:
        pairs = pairs_mean(b, layer, probabilities, state["values"])
    q, shift = given["q"], given.get("shift")
    out = weighted_mean(b, layer, state, given, q, logits, probabilities, pairs, shift, 1)
    out = b.reshape(b.cast(out, layer.dtype, layer.wide), 0, config.query_heads, 1, -1)
    out = b("Where", incoming4, out, b.constant(0, layer.dtype))

    # 3. Scores, from the softmax over the pairs alone.
    if policy.gains is Gain.SUM:
        faded = state["scores"]
        if policy.decay != 1:
            faded = b("Mul", faded, b.constant(policy.decay, layer.wide))
        gained = b("ReduceSum", probabilities, b.ints(2), keepdims=0)
        state["scores"] = b("Where", incoming, b("Add", faded, gained), state["scores"])
    elif policy.gains is Gain.HISTORY:
        state.update(_remember(b, layer, state, probabilities, empty, incoming))
    return [out, *closed(b, layer, state)]


def _coded_logits(b: Builder, layer: Layer, state: Values, given: Values, slot: Value) -> Value:
    """[B, Hkv, G, C] over codes. The pair's own step reads it as it came, not as it is coded."""
    layout = layer.config.key_layout
    if layout is None:
        raise AssertionError("a layer without codes")
    q = grouped_queries(b, layer, given["q"])
    found = codes.products(b, layout, q, state["keys"], layer.wide)
    scales = b.unsqueeze(b.cast(state["key_scales"], layer.wide), 2)
    own = b("MatMul", q, b("Transpose", given["k"], perm=[0, 1, 3, 2]))
    logits = b("ScatterElements", b("Mul", found, scales), _column(b, layer, slot), own, axis=3)
    return capped(b, layer, logits)


def _coded_mean(
    b: Builder, layer: Layer, state: Values, v: Value, probabilities: Value, slot: Value
) -> Value:
    """[B, Hkv, G, D] over codes, the new pair `v` [B, Hkv, 1, D] as it came."""
    layout = layer.config.value_layout
    if layout is None:
        raise AssertionError("a layer without codes")
    scales = b.cast(state["value_scales"], layer.wide)
    # With a scale of 0 the pair's codes count for nothing.
    none = b("Mul", b.cast(slot, layer.wide), b.constant(0, layer.wide))
    scales = b.unsqueeze(b.put(scales, slot, none), 2)
    mean = codes.mixed(b, layout, b("Mul", probabilities, scales), state["values"], layer.wide)
    share = b("GatherElements", probabilities, _column(b, layer, slot), axis=3)
    return b("Add", mean, b("Mul", share, v))


def _column(b: Builder, layer: Layer, slot: Value) -> Value:
    """A slot [B, Hkv, 1] of all queries of a group: [B, Hkv, G, 1]."""
    return b("Expand", b.unsqueeze(slot, 2), b.ints(1, 1, layer.config.group, 1))


def _row(b: Builder, heads: int, slot: Value) -> Value:
    """[B, Hkv, 3]: sequence, head and slot, which name a whole row of keys or values at once.

    ScatterElements would need an index for each of its D numbers, and takes several times as long.
    """
    zero = b("Sub", slot, slot)
    one = b("Add", zero, b.constant(1, "int64"))
    sequence = b("CumSum", one, b.constant(0, "int64"), exclusive=1)
    head = b("Add", zero, b.constant([[[h] for h in range(heads)]], "int64"))
    return b("Concat", sequence, head, slot, axis=2)


def _remember(
    b: Builder, layer: Layer, state: Values, probabilities: Value, empty: Value, incoming: Value
) -> Values:
    """History and scores after one more query."""
    visible = b("Not", empty)
    attended = b("ReduceSum", b.cast(visible, "int32"), b.ints(2))
    share = b("ReduceMean", probabilities, b.ints(2), keepdims=0)
    bits = persistent_bits(b, layer, share, attended, visible)
    # Doubling shifts the bits, and the remainder drops the oldest.
    twice = b("Add", b("Mul", state["history"], b.constant(2, "int64")), bits)
    history = b("Mod", twice, b.constant(2**layer.config.policy.history_window, "int64"))
    history = b("Where", incoming, history, state["history"])
    scores = b("Where", incoming, popcount(b, layer, history), state["scores"])
    return {"history": history, "scores": scores}
