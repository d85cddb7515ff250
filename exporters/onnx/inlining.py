"""An exported graph without functions, for runtimes that do not take them; OpenVINO is one."""

from __future__ import annotations

from onnx_ir.passes import common as common_passes
from onnxscript import ir

from less_cache.policies import Gain

from .building import Builder
from .heads import ModelLayer
from .nodes import DOMAIN
from .rewriting import splice, stable_order

LARGEST_WINDOW = 22
"""Bits of history that are exact where integers are computed in float32, twice their number too."""


def check_inline(layers: list[ModelLayer]) -> None:
    """Refuse what the runtimes for which functions are written out would compute wrongly.

    Raises
    ------
    ValueError
        If a layer's policy keeps more bits of history than OpenVINO computes with.
    """
    for layer in layers:
        policy = layer.config.policy
        if policy.gains is Gain.HISTORY and policy.history_window > LARGEST_WINDOW:
            raise ValueError(
                f"inline: layer {layer.index} has {policy}, but OpenVINO takes remainders in "
                f"float32, which has room for a window of {LARGEST_WINDOW}"
            )


def write_out(model: ir.Model, layers: list[ModelLayer]) -> None:
    """Write each function out where it is called, in place.

    OpenVINO differs from ONNX in two ways, around which the bodies are led. It does not sort
    equal numbers in their order, on which policies rely. And what an ``If`` gives is spoilt when
    another one runs before it is read: the heads of a layer that differ in capacity, each with
    an ``If`` of their own, share one.
    """
    common_passes.InlinePass()(model)
    model.graph.opset_imports.pop(DOMAIN, None)
    for layer in layers:
        if len(layer.runs) > 1:
            _join(model.graph, [f"layers.{run.name}.attention" for run in layer.runs])
    for number, node in enumerate(list(ir.traversal.RecursiveGraphIterator(model.graph))):
        if node.op_type == "TopK" and _sorts_scores(node):
            _make_stable(node, f"stable{number}")
    common_passes.RemoveUnusedNodesPass()(model)


def _join(graph: ir.Graph, names: list[str]) -> None:
    """Replace a layer's ``If`` nodes, and the ``Concat`` of what they attended to, by one."""
    nodes = {node.name: node for node in graph}
    choices = [nodes[name] for name in names]
    ((concat, _),) = choices[0].outputs[0].uses()
    if [value.producer() for value in concat.inputs if value is not None] != choices:
        raise AssertionError(f"{concat.name}: expected to join {names}")
    branches = {}
    for name in ("then_branch", "else_branch"):
        parts = [choice.attributes[name].as_graph() for choice in choices]
        joined = ir.node(
            "Concat",
            [part.outputs[0] for part in parts],
            {"axis": concat.attributes["axis"].as_int()},
            name=f"{names[0]}.{name}.heads",
        )
        joined.outputs[0].name = f"{names[0]}.{name}.out"
        joined.outputs[0].type = concat.outputs[0].type
        outputs = [joined.outputs[0], *(x for part in parts for x in part.outputs[1:])]
        body = []
        for number, part in enumerate(parts):
            moved = list(part)
            part.outputs.clear()
            part.remove(moved)
            body += moved
            # Two bodies were written out alike.
            for node in moved:
                for value in node.outputs:
                    if value not in outputs:
                        value.name = f"{value.name}.{number}"
        branches[name] = ir.Graph([], outputs, nodes=[*body, joined], name=f"{names[0]}.{name}")
    old = [concat.outputs[0], *(value for choice in choices for value in choice.outputs[1:])]
    one = ir.node("If", [choices[0].inputs[0]], branches, num_outputs=len(old), name=names[0])
    graph.insert_before(concat, one)
    for value, new in zip(old, one.outputs, strict=True):
        new.name, new.type, new.shape = value.name, value.type, value.shape
        ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
    graph.remove([concat, *choices], safe=True)


def _sorts_scores(node: ir.Node) -> bool:
    """Whether numbers are sorted that may be equal: those picked by a first sort, of positions."""
    x = node.inputs[0]
    source = x.producer() if x is not None else None
    if source is None or source.op_type != "GatherElements" or source.inputs[1] is None:
        return False
    first = source.inputs[1].producer()
    return first is not None and first.op_type == "TopK"


def _make_stable(node: ir.Node, prefix: str) -> None:
    x, size, graph = node.inputs[0], node.inputs[1], node.graph
    if x is None or size is None or not isinstance(graph, ir.Graph):
        raise AssertionError(f"{node.name}: a sort of nothing")
    scratch = ir.Graph([], [], nodes=[], name=prefix)
    axis = node.attributes["axis"].as_int()
    order = stable_order(Builder(scratch, prefix), x, size, axis, "int64")
    splice(graph, node, scratch, {1: order})
