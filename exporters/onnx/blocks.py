"""Attention of many queries by blocks, as an ONNX ``Loop``: no [S, S] matrix is ever held."""

from __future__ import annotations

from onnxscript import ir

from .building import KINDS, Builder, Value
from .parts import Layer, Values, pair_logits, pairs_mean, weighted_mean

BLOCK_ELEMENTS = 2**24
"""How many logits one block may have: 64 MiB of them."""


def attend_in_blocks(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    q: Value,
    shift: Value | None,
    weight: Value | None,
    *,
    opset: int,
) -> tuple[Value, Value | None]:
    """Attend from new queries over all pairs, the new ones included.

    Parameters
    ----------
    b
        Gets the nodes.
    layer
        Shapes and maps' kind.
    state
        H and z; keys and values [B, Hkv, N, D] and positions [B, Hkv, N], of which the last S are
        new.
    maps
        For φ.
    q
        [B, Hq, S, D].
    shift
        [B, Hq, S], added to the queries' products; ``None``: nothing.
    weight
        [B, S], what each query's probabilities count for; ``None`` if no score needs them.
    opset
        The opset of the loop's body.

    Returns
    -------
    out
        [B, Hq, S, D].
    gained
        [B, Hkv, N], each pair's weighted sum of probabilities; ``None`` without `weight`.
    """
    config = layer.config
    rows, span = b.dim(q, 2), b.dim(state["keys"], 2)
    kept = b("Sub", span, rows)
    per_row = b("Mul", b("Mul", b.dim(q, 0), span), b.ints(config.query_heads))
    block = b("Div", b.ints(BLOCK_ELEMENTS), per_row)
    block = b("Max", b("Min", block, rows), b.ints(1))
    last = b("Sub", b("Add", rows, block), b.ints(1))
    trips = b("Squeeze", b("Div", last, block))
    bias = _bias(b, layer, state["positions"])

    turn = ir.val(f"{b.prefix}_turn", ir.DataType.INT64, ir.Shape([]))
    go_on = ir.val(f"{b.prefix}_go_on", ir.DataType.BOOL, ir.Shape([]))
    done = ir.Value(name=f"{b.prefix}_done", type=ir.TensorType(KINDS[layer.dtype]))
    body = ir.Graph([turn, go_on, done], [], nodes=[], name="block", opset_imports={"": opset})
    inner = Builder(body, f"{b.prefix}_block")
    start = inner("Mul", inner("Reshape", turn, inner.ints(1)), block)
    stop = inner("Min", inner("Add", start, block), rows)
    upto = inner("Add", kept, stop)

    def seen(array: Value) -> Value:
        return inner("Slice", array, inner.ints(0), upto, inner.ints(2))

    part = inner("Slice", q, start, stop, inner.ints(2))
    lift = None if shift is None else inner("Slice", shift, start, stop, inner.ints(2))
    shown = {**state, **{name: seen(state[name]) for name in ("keys", "values")}}
    bounds = (start, stop, kept, upto)
    out, probabilities = _attend(inner, layer, shown, maps, part, lift, seen(bias), bounds)
    body.outputs.extend([inner("Identity", go_on), inner("Concat", done, out, axis=2)])
    carried = [b("Slice", q, b.ints(0), b.ints(0), b.ints(2))]
    if weight is not None:
        total = ir.Value(name=f"{b.prefix}_total", type=ir.TensorType(KINDS[layer.wide]))
        body.inputs.append(total)
        share = inner("Slice", weight, start, stop, inner.ints(1))
        gained = _gained(inner, layer, share, probabilities)
        pads = inner("Concat", inner.ints(*[0] * 5), inner("Sub", span, upto), axis=0)
        body.outputs.append(inner("Add", total, inner("Pad", gained, pads)))
        carried.append(b("Expand", b.constant(0, layer.wide), b("Shape", state["positions"])))
    loop = b.many("Loop", [trips, None, *carried], len(carried), body=body)
    return loop[0], loop[1] if weight is not None else None


def attend_at_once(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    q: Value,
    shift: Value | None,
    weight: Value | None,
    *,
    opset: int,
) -> tuple[Value, Value | None]:
    """`attend_in_blocks` with one block and no loop, for runtimes whose loops are limited."""
    rows, span = b.dim(q, 2), b.dim(state["keys"], 2)
    bounds = (b.ints(0), rows, b("Sub", span, rows), span)
    bias = _bias(b, layer, state["positions"])
    out, probabilities = _attend(b, layer, state, maps, q, shift, bias, bounds)
    return out, None if weight is None else _gained(b, layer, weight, probabilities)


def _bias(b: Builder, layer: Layer, positions: Value) -> Value:
    """[B, Hkv, N], to be added to the logits: the lowest number at empty slots, else zero."""
    empty = b("Less", positions, b.constant(0, "int32"))
    return b("Where", empty, b.constant(layer.lowest, layer.wide), b.constant(0, layer.wide))


def _attend(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    q: Value,
    shift: Value | None,
    bias: Value,
    bounds: tuple[Value, Value, Value, Value],
) -> tuple[Value, Value]:
    """One block's output [B, Hq, s, D] and probabilities [B, Hkv, G * s, n].

    `state` has the keys and values that the block may see, but all positions. `bounds` are the
    block's first row, the row after its last, the number of pairs that are not new, and n.
    """
    config = layer.config
    start, stop, kept, upto = bounds
    logits = pair_logits(b, layer, q, state["keys"])
    hidden = _hidden(b, layer, state["positions"], bias, (start, kept, upto))
    if config.group == 1:
        logits = b("Add", logits, hidden)
    else:
        # [B, Hkv, G * S, N] as [B, Hkv, G, S, N]: the heads of a group see the same pairs.
        size = b("Sub", stop, start)
        split = b("Concat", b.ints(0, 0, config.group), size, upto, axis=0)
        logits = b("Add", b("Reshape", logits, split), b.unsqueeze(hidden, 2))
        joined = b("Concat", b.ints(0, 0, -1), upto, axis=0)
        logits = b("Reshape", logits, joined)
    probabilities = b("Softmax", logits, axis=-1)
    pairs = pairs_mean(b, layer, probabilities, state["values"])
    out = weighted_mean(b, layer, state, maps, q, logits, probabilities, pairs, shift)
    out = b.cast(out, layer.dtype, layer.wide)
    return b.reshape(out, 0, config.query_heads, -1, config.head_dim), probabilities


def _gained(b: Builder, layer: Layer, share: Value, probabilities: Value) -> Value:
    """[B, Hkv, n]: a sum over a block's queries, with their weights [B, s]."""
    share = b("Concat", *[share] * layer.config.group, axis=1)
    return b("Squeeze", b("MatMul", b.unsqueeze(share, 1, 2), probabilities), b.ints(2))


def _hidden(
    b: Builder,
    layer: Layer,
    positions: Value,
    bias: Value,
    bounds: tuple[Value, Value, Value],
) -> Value:
    """What is added to the logits, zero where a pair is seen: [B, Hkv, S or 1, N]."""
    start, kept, upto = bounds
    lowest, zero = b.constant(layer.lowest, layer.wide), b.constant(0, layer.wide)
    one = b.constant(1, "int64")
    scalar = [b("Squeeze", bound) for bound in (b("Add", kept, start), upto)]
    row = b("Range", scalar[0], scalar[1], one)
    column = b("Range", b.constant(0, "int64"), scalar[1], one)
    future = b("Greater", column, b.unsqueeze(row, 1))
    if layer.window:
        first = b("Add", kept, start)
        own = b("Slice", positions, first, upto, b.ints(2))
        oldest = b("Sub", b.unsqueeze(own, 3), b.constant(layer.window - 1, "int32"))
        held = b("Slice", positions, b.ints(0), upto, b.ints(2))
        future = b("Or", future, b("Less", b.unsqueeze(held, 2), oldest))
    # Twice the lowest number is -inf. But a query's own pair is never in its future: even where
    # padding sees nothing, that number stays finite.
    return b("Add", b("Where", future, lowest, zero), b.unsqueeze(bias, 2))
