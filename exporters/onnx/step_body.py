"""One new token of each sequence, as `less_cache.backends.torch.step` takes it."""

from __future__ import annotations

from less_cache import ops
from less_cache.arrays import EMPTY
from less_cache.policies import Gain, Start

from .building import Builder, Value
from .parts import (
    Layer,
    Values,
    choose_slot,
    initial_scores,
    merge,
    pair_logits,
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
    state = {name: given[name] for name in ops.state_names(config)}
    incoming = b.unsqueeze(b.cast(given["mask"], "bool"), 2)
    seen = b.unsqueeze(given["length"], 1, 2)

    # 1. Make room. An empty slot counts as a victim that leaves nothing behind.
    slot = choose_slot(b, layer, state, seen)
    row = _row(b, config.kv_heads, slot)
    old = {name: b.unsqueeze(b("GatherND", state[name], row), 2) for name in ("keys", "values")}
    old_position = b.take(state["positions"], slot)
    held = b("Greater", old_position, b.constant(EMPTY, "int32"))
    victim = (old["keys"], old["values"])
    state = merge(b, layer, state, given, victim, b("And", held, incoming), 1)

    # 4, before 2: the pair goes in first, so that a query sees itself like any other pair.
    incoming4 = b.unsqueeze(incoming, 3)
    for name, new in (("keys", given["k"]), ("values", given["v"])):
        pair = b("Squeeze", b("Where", incoming4, new, old[name]), b.ints(2))
        state[name] = b("ScatterND", state[name], row, pair)
    state["positions"] = b.put(state["positions"], slot, b("Where", incoming, seen, old_position))
    if policy.starts is not Start.ZERO or policy.gains is not Gain.NONE:
        first = initial_scores(b, layer, given["k"], seen, spread=False)
        old_score = b.take(state["scores"], slot)
        state["scores"] = b.put(state["scores"], slot, b("Where", incoming, first, old_score))
    if policy.history_window:
        none = b("Where", incoming, b.constant(0, "int64"), b.take(state["history"], slot))
        state["history"] = b.put(state["history"], slot, none)

    # 2. Attend.
    logits = pair_logits(b, layer, given["q"], state["keys"])
    empty = b("Less", state["positions"], b.constant(0, "int32"))
    logits = b("Where", b.unsqueeze(empty, 2), b.constant(layer.lowest, layer.wide), logits)
    probabilities = b("Softmax", logits, axis=-1)
    values = state["values"]
    out = weighted_mean(b, layer, state, given, given["q"], logits, probabilities, values, 1)
    out = b.reshape(b.cast(out, config.dtype, layer.wide), 0, config.query_heads, 1, -1)
    out = b("Where", incoming4, out, b.constant(0, config.dtype))

    # 3. Scores, from the softmax over the pairs alone.
    if policy.gains is Gain.SUM:
        faded = state["scores"]
        if policy.decay != 1:
            faded = b("Mul", faded, b.constant(policy.decay, layer.wide))
        gained = b("ReduceSum", probabilities, b.ints(2), keepdims=0)
        state["scores"] = b("Where", incoming, b("Add", faded, gained), state["scores"])
    elif policy.gains is Gain.HISTORY:
        state.update(_remember(b, layer, state, probabilities, empty, incoming))
    return [out, *(state[name] for name in ops.state_names(config))]


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
