"""Attention of many queries by blocks, as an ONNX ``Loop``: no [S, S] matrix is ever held."""

from __future__ import annotations

from onnxscript import ir

from .building import KINDS, Builder, Value
from .parts import Layer, Values, pair_logits, weighted_mean

BLOCK_ELEMENTS = 2**24
"""How many logits one block may have: 64 MiB of them."""


def attend_in_blocks(
    b: Builder,
    layer: Layer,
    state: Values,
    maps: Values,
    q: Value,
    weight: Value | None,
    *,
    opset: int,
) -> tuple[Value, Value | None]:
    """Attend from new queries over what is held, the new pairs among it.

    Parameters
    ----------
    b
        Gets the nodes.
    layer
        Shapes and maps' kind.
    state
        H and z; keys, values [B, Hkv, N, D] and positions [B, Hkv, N], the last S of them new.
    maps
        For φ.
    q
        [B, Hq, S, D].
    weight
        [B, S], what each query's probabilities count for, where anybody asks.
    opset
        Of the loop's body.

    Returns
    -------
    out
        [B, Hq, S, D].
    gained
        [B, Hkv, N], each pair's weighted sum of probabilities, where there is a weight.
    """
    config = layer.config
    rows, span = b.dim(q, 2), b.dim(state["keys"], 2)
    kept = b("Sub", span, rows)
    per_row = b("Mul", b("Mul", b.dim(q, 0), span), b.ints(config.query_heads))
    block = b("Div", b.ints(BLOCK_ELEMENTS), per_row)
    block = b("Max", b("Min", block, rows), b.ints(1))
    last = b("Sub", b("Add", rows, block), b.ints(1))
    trips = b("Squeeze", b("Div", last, block))
    # Empty slots get the lowest number by a sum: one pass, and small beside the logits.
    empty = b("Less", state["positions"], b.constant(0, "int32"))
    bias = b("Where", empty, b.constant(layer.lowest, layer.wide), b.constant(0, layer.wide))

    turn = ir.val(f"{b.prefix}_turn", ir.DataType.INT64, ir.Shape([]))
    go_on = ir.val(f"{b.prefix}_go_on", ir.DataType.BOOL, ir.Shape([]))
    done = ir.Value(name=f"{b.prefix}_done", type=ir.TensorType(KINDS[config.dtype]))
    body = ir.Graph([turn, go_on, done], [], nodes=[], name="block", opset_imports={"": opset})
    inner = Builder(body, f"{b.prefix}_block")
    start = inner("Mul", inner("Reshape", turn, inner.ints(1)), block)
    stop = inner("Min", inner("Add", start, block), rows)
    upto = inner("Add", kept, stop)

    def seen(array: Value) -> Value:
        return inner("Slice", array, inner.ints(0), upto, inner.ints(2))

    part = inner("Slice", q, start, stop, inner.ints(2))
    keys, values = seen(state["keys"]), seen(state["values"])
    logits = pair_logits(inner, layer, part, keys)
    hidden = _hidden(inner, layer, state["positions"], seen(bias), (start, kept, upto))
    size = inner("Sub", stop, start)
    if config.group == 1:
        logits = inner("Add", logits, hidden)
    else:
        # [B, Hkv, G * S, N] as [B, Hkv, G, S, N], for a group's heads share what they see.
        split = inner("Concat", inner.ints(0, 0, config.group), size, upto, axis=0)
        logits = inner("Add", inner("Reshape", logits, split), inner.unsqueeze(hidden, 2))
        joined = inner("Concat", inner.ints(0, 0, -1), upto, axis=0)
        logits = inner("Reshape", logits, joined)
    probabilities = inner("Softmax", logits, axis=-1)
    out = weighted_mean(inner, layer, state, maps, part, logits, probabilities, values)
    out = inner.cast(out, config.dtype, layer.wide)
    out = inner.reshape(out, 0, config.query_heads, -1, config.head_dim)
    body.outputs.extend([inner("Identity", go_on), inner("Concat", done, out, axis=2)])
    carried = [b("Slice", q, b.ints(0), b.ints(0), b.ints(2))]
    if weight is not None:
        total = ir.Value(name=f"{b.prefix}_total", type=ir.TensorType(KINDS[layer.wide]))
        body.inputs.append(total)
        share = inner("Slice", weight, start, stop, inner.ints(1))
        share = inner("Concat", *[share] * config.group, axis=1)
        gained = inner("MatMul", inner.unsqueeze(share, 1, 2), probabilities)
        gained = inner("Squeeze", gained, inner.ints(2))
        pads = inner("Concat", inner.ints(*[0] * 5), inner("Sub", span, upto), axis=0)
        body.outputs.append(inner("Add", total, inner("Pad", gained, pads)))
        carried.append(b("Expand", b.constant(0, layer.wide), b("Shape", state["positions"])))
    loop = b.many("Loop", [trips, None, *carried], len(carried), body=body)
    return loop[0], loop[1] if weight is not None else None


def _hidden(
    b: Builder,
    layer: Layer,
    positions: Value,
    bias: Value,
    bounds: tuple[Value, Value, Value],
) -> Value:
    """What is added to the logits: [B, Hkv, S, N], or with 1 for S, zero where a pair is seen."""
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
    # Twice the lowest is -inf; where all is hidden from padding, one number stays finite: its own.
    return b("Add", b("Where", future, lowest, zero), b.unsqueeze(bias, 2))
