"""The traced decoder as a file's graph: each layer's attention a choice of two operators."""

from __future__ import annotations

import numpy as np
from onnx_ir.passes import common as common_passes
from onnxscript import ir

from .building import Builder, Value
from .heads import HeadRun, ModelLayer
from .nodes import CHUNK, DOMAIN, STEP, function, node_attributes, node_inputs, node_outputs
from .parts import Layer
from .tracing import APPEND, outputs_of

IR_VERSION = 10


def assemble(model: ir.Model, layers: list[ModelLayer], opset: int) -> ir.Model:
    """Replace each `APPEND` node by a choice: `STEP` if S = 1, else `CHUNK`.

    Parameters
    ----------
    model
        From `decoder.trace_decoder`; changed in place.
    layers
        The model's, in order.
    opset
        ONNX's opset.
    """
    graph = model.graph
    head = ir.Graph([], [], nodes=[], name="head")
    build = Builder(head, "less")
    ids, mask = graph.inputs[:2]
    single = build("Equal", build.dim(ids, 1), build.ints(1))
    single = build("Squeeze", single)
    _shorten_mask(build, ids, mask)
    _move_to_front(head, graph)
    appends = [node for node in graph if node.op_type == APPEND and node.domain == DOMAIN]
    runs = [run for layer in layers for run in layer.runs]
    if len(appends) != len(runs):
        raise AssertionError(f"{len(appends)} runs of heads attended, expected {len(runs)}")
    overloads: dict[Layer, str] = {}
    for run in runs:
        overloads.setdefault(run.layer, str(len(overloads)) if overloads else "")
    for node, run in zip(appends, runs, strict=True):
        _choose(graph, node, single, run, overloads[run.layer])
    for layer, overload in overloads.items():
        for name in (STEP, CHUNK):
            body = function(name, layer, opset, overload)
            model.functions[body.identifier()] = body
    graph.opset_imports[DOMAIN] = 1
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "less_cache", None
    _share_embedding(graph)
    common_passes.RemoveUnusedNodesPass()(model)
    _forget_origins(model)
    return model


def _shorten_mask(build: Builder, ids: Value, mask: Value) -> None:
    """Take a mask of all tokens so far, as is usual elsewhere, and use only the new ones' part."""
    users = list(mask.uses())
    tokens = build("Neg", build.dim(ids, 1))
    new = build("Slice", mask, tokens, build.ints(2**31 - 1), build.ints(1))
    for user, position in users:
        user.replace_input_with(position, new)
    if mask.shape is not None:
        mask.shape = ir.Shape([mask.shape[0], "total"])


def _move_to_front(head: ir.Graph, graph: ir.Graph) -> None:
    nodes = list(head)
    head.remove(nodes)
    graph.insert_before(graph[0], nodes)


def _choose(graph: ir.Graph, node: ir.Node, single: Value, run: HeadRun, overload: str) -> None:
    layer, prefix = run.layer, f"layers.{run.name}"
    taken = outputs_of(node)
    inputs = list(node.inputs)
    wanted = node_inputs(layer.config, layer.kind)
    if len(inputs) != len(wanted):
        raise AssertionError(f"{prefix}: {len(inputs)} inputs, expected {wanted}")
    names = node_outputs(layer.config)
    branches = {}
    for branch, op in (("then_branch", STEP), ("else_branch", CHUNK)):
        attributes = node_attributes(layer.config, layer.kind)
        call = ir.node(
            op,
            inputs,
            attributes,
            domain=DOMAIN,
            overload=overload,
            num_outputs=len(names),
            name=f"{prefix}.{op}",
        )
        for value, name in zip(call.outputs, names, strict=True):
            value.name = f"{prefix}.{op}.{name}"
            like = inputs[0] if name == "out" else inputs[5 + names.index(name) - 1]
            if like is not None:
                value.type, value.shape = like.type, like.shape
        branches[branch] = ir.Graph([], call.outputs, nodes=[call], name=f"{prefix}.{op}")
    choice = ir.node("If", [single], branches, num_outputs=len(names), name=f"{prefix}.attention")
    for position, (value, name) in enumerate(zip(choice.outputs, names, strict=True)):
        value.name = f"{prefix}.{name}"
        result = branches["then_branch"].outputs[position]
        value.type, value.shape = result.type, result.shape
        if position in taken:
            old = taken[position].outputs[0]
            if old.is_graph_output():
                value.name = old.name
            ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.insert_before(node, choice)
    graph.remove([*taken.values(), node], safe=True)


def _share_embedding(graph: ir.Graph) -> None:
    """Let a tied head read the embedding instead of the transposed copy that tracing made."""
    initializers = list(graph.initializers.values())
    for table in initializers:
        if not any(user.op_type == "Gather" and place == 0 for user, place in table.uses()):
            continue
        for copy in initializers:
            if _is_transposed(table, copy):
                node = ir.node("Transpose", [table], {"perm": [1, 0]}, name="tied_head")
                node.outputs[0].name = "tied_head"
                node.outputs[0].type, node.outputs[0].shape = copy.type, copy.shape
                graph.insert_before(graph[0], node)
                ir.convenience.replace_all_uses_with(copy, node.outputs[0])


def _is_transposed(table: Value, copy: Value) -> bool:
    first, second = table.const_value, copy.const_value
    if first is None or second is None or len(first.shape) != 2 or first is second:
        return False
    if tuple(first.shape)[::-1] != tuple(second.shape) or first.dtype != second.dtype:
        return False
    return bool(np.array_equal(first.numpy().T, second.numpy()))


def _forget_origins(model: ir.Model) -> None:
    """Drop the notes on where nodes came from: they hold paths of the exporting machine."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(body.graph for body in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
