"""Replacing nodes of a finished graph, for runtimes that need them written differently."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from .building import Builder, Value


def splice(graph: ir.Graph, node: ir.Node, scratch: ir.Graph, results: dict[int, Value]) -> None:
    """Replace one node by the nodes of `scratch`.

    Parameters
    ----------
    graph
        The graph that has the node.
    node
        The node to remove.
    scratch
        The nodes to put there; empty afterwards.
    results
        The values that replace the node's outputs, by place. Other outputs must be unused.
    """
    nodes = list(scratch)
    scratch.remove(nodes)
    graph.insert_before(node, nodes)
    for place, value in results.items():
        old = node.outputs[place]
        if old.is_graph_output():
            # Names of outputs are the file's interface; an input may not be an output as well.
            if value.producer() is None:
                passed = ir.node("Identity", [value], name=f"{old.name}.passed")
                graph.insert_before(node, passed)
                value = passed.outputs[0]
            value.name = old.name
        value.type, value.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def stable_order(b: Builder, x: Value, size: Value, axis: int, kind: str) -> Value:
    """Indices that sort `x`, the first of equal numbers first, whatever order ``TopK`` gives them.

    The policies rely on that order, which ONNX prescribes and not every runtime keeps. The sorted
    numbers are ranked, equal ones with the same rank, and sorted again by (rank, place), where no
    two are equal.

    Parameters
    ----------
    b
        Gets the nodes.
    x
        Floats.
    size
        How many numbers there are along `axis`: [1] int64.
    axis
        Along which to sort.
    kind
        In which to compute (rank, place): the square of `size` must be exact in it.
    """
    values, places = b.many("TopK", [x, size], 2, axis=axis, largest=0, sorted=1)
    span = b("Shape", values, start=axis, end=axis + 1)
    zero, one, end = b.ints(0), b.ints(1), b.ints(np.iinfo(np.int32).max)
    along = b.ints(axis)
    before = b("Slice", values, zero, b("Sub", span, one), along)
    after = b("Slice", values, one, end, along)
    rises = b.cast(b("Greater", after, before), "float32")
    start = b.cast(b("Slice", places, zero, one, along), "float32")
    first = b("Mul", start, b.constant(0, "float32"))
    group = b("CumSum", b("Concat", first, rises, axis=axis), b.constant(axis, "int64"))
    rank = b("Mul", b.cast(group, kind, "float32"), b.cast(span, kind, "int64"))
    key = b("Add", rank, b.cast(places, kind, "int64"))
    order = b.many("TopK", [key, size], 2, axis=axis, largest=0, sorted=1)[1]
    return b("GatherElements", places, order, axis=axis)
