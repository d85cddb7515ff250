"""Two graphs for TensorRT from one exported file: a step's, and a prompt's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
from onnxscript import ir
from onnxscript.ir.passes import common as common_passes

from exporters.common.heads import exported_layer
from exporters.common.manifest import MODEL, Manifest, read_manifest
from exporters.onnx.blocks import attend_at_once
from exporters.onnx.building import KINDS, Builder, Value
from exporters.onnx.chunk_body import chunk_body
from exporters.onnx.heads import ModelLayer
from exporters.onnx.layers import sliding_layer
from exporters.onnx.nodes import DOMAIN, STEP, node_inputs, node_outputs
from exporters.onnx.parts import Layer, Values
from exporters.onnx.rewriting import splice
from exporters.onnx.step_body import step_body
from less_cache._files import replaced
from less_cache.layer_maps import FIRST_LAYERS
from less_cache.ops import FOLDED_BIAS

from .files import PLUGIN_CODE_DTYPE
from .limits import counts_order
from .operators import OPSET, check_operators
from .rewrites import rewrite

PROMPT_GRAPH = "prompt.onnx"
STEP_GRAPH = "step.onnx"
STANDARD_STEP_GRAPH = "step.standard.onnx"
"""A step without the plugin."""

CODE_DTYPE = "float16"
"""Of the bytes of codes inside a graph: TensorRT has uint8 only at an engine's edge, where it casts
it to and from 16- and 32-bit floats. Numbers up to 255 are exact in both."""


CODED_ARRAYS = ("keys", "values")
"""What is bytes where pairs are coded."""


def derive_graphs(
    folder: str | Path, *, plugin: bool = True, verify: bool = True
) -> tuple[Path, Path]:
    """Write a step's and a prompt's graph beside ``model.onnx``, whose weights they share.

    Neither has a choice, a loop, a function, or an operator that TensorRT's parser does not list;
    see `operators`. Inputs and outputs keep their names. ``attention_mask`` covers the new tokens
    only. Bytes of codes are uint8 but where a plugin takes them: there they are int8.

    Parameters
    ----------
    folder
        What `exporters.onnx.export_decoder` wrote; the graphs are written there, too.
    plugin
        Leave each layer's step to the plugin ``LessAttention``; otherwise it is written out in
        standard operators, and no plugin is needed.
    verify
        Compare the digest of every file with the manifest's; otherwise only the sizes.

    Returns
    -------
    tuple of Path
        The step's graph and the prompt's.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder is not what its manifest says.
    ValueError
        If the model has an operator that TensorRT does not take. Nothing is written then.
    """
    manifest = read_manifest(folder, verify=verify)
    step = _derive(manifest, step=True, plugin=plugin)
    prompt = _derive(manifest, step=False, plugin=plugin)
    paths = (
        manifest.folder / (STEP_GRAPH if plugin else STANDARD_STEP_GRAPH),
        manifest.folder / PROMPT_GRAPH,
    )
    for path, model in zip(paths, (step, prompt), strict=True):
        with replaced(path) as temporary:
            temporary.write_bytes(model.SerializeToString())
    return paths


def layers_of(manifest: Manifest) -> list[ModelLayer]:
    """The model's layers, from its manifest."""
    full = manifest.full_layers
    layers = []
    for index, entry in enumerate(manifest.data["layers"]):
        if entry["window"]:
            window = entry["window"]
            layers.append(ModelLayer(index, sliding_layer(manifest.config, window), None, window))
        else:
            config = exported_layer(manifest.config, full.index(index))
            layers.append(ModelLayer(index, config, entry["maps"]))
    return layers


def _derive(manifest: Manifest, *, step: bool, plugin: bool) -> onnx.ModelProto:
    # Read without the weights: the new graphs refer to the same file of weights.
    proto = onnx.load(str(manifest.folder / MODEL), load_external_data=False)
    if not proto.functions:
        raise ValueError(
            f"{manifest.folder / MODEL}: exported with inline=True, which leaves no operators of "
            "ours to put others in the place of; export it without"
        )
    model = ir.from_proto(proto)
    graph = model.graph
    _take_whole_mask(graph)
    choices = [node for node in graph if node.op_type == "If"]
    runs = [run for layer in layers_of(manifest) for run in layer.runs]
    if len(choices) != len(runs):
        raise ValueError(
            f"{manifest.folder / MODEL}: attention in {len(choices)} places, but the manifest has "
            f"{len(runs)} runs of heads"
        )
    for index, (choice, run) in enumerate(zip(choices, runs, strict=True)):
        call = next(iter(choice.attributes["then_branch"].as_graph()))
        if step and plugin:
            _call(graph, choice, call, run.layer)
        else:
            _write_out(graph, choice, call, run.layer, step, f"attention{index}")
    model.functions.clear()
    common_passes.RemoveUnusedNodesPass()(model)
    if not (step and plugin):
        graph.opset_imports.pop(DOMAIN, None)
    if step:
        _fix_sequence(graph)
    _forget_shapes(graph)
    model = ir.from_proto(_inferred(model))
    rewrite(model, count=counts_order(manifest))
    model.graph.opset_imports[""] = OPSET
    common_passes.RemoveUnusedNodesPass()(model)
    inferred = _inferred(model)
    check_operators(inferred)
    return inferred


def _take_whole_mask(graph: ir.Graph) -> None:
    """Make the mask that of the new tokens, instead of the last columns of a longer one."""
    ids, mask = graph.inputs[:2]
    for user, place in list(mask.uses()):
        if user.op_type == "Slice" and place == 0:
            ir.convenience.replace_all_uses_with(user.outputs[0], mask)
            graph.remove(user, safe=True)
    mask.shape = ids.shape


def _call(graph: ir.Graph, choice: ir.Node, call: ir.Node, layer: Layer) -> None:
    """Replace the choice by the step's node."""
    node = ir.node(
        call.op_type,
        list(call.inputs),
        dict(call.attributes),
        domain=call.domain,
        overload=call.overload,
        num_outputs=len(call.outputs),
        name=call.name,
    )
    for value, old in zip(node.outputs, call.outputs, strict=True):
        value.name, value.type, value.shape = old.name, old.type, old.shape
    scratch = ir.Graph([], [], nodes=[node], name="call")
    splice(graph, choice, scratch, dict(enumerate(node.outputs)))
    if layer.config.quantization is not None:
        _retype(graph, node, layer)


def _retype(graph: ir.Graph, node: ir.Node, layer: Layer) -> None:
    """Give the plugin codes as int8, and the maps' matrices in the model's dtype."""
    config, kind = layer.config, KINDS[layer.config.dtype]
    inputs, outputs = node_inputs(config, layer.kind), node_outputs(config)
    for name in CODED_ARRAYS:
        for value in (node.inputs[inputs.index(name)], node.outputs[outputs.index(name)]):
            if value is None or not (value.is_graph_input() or value.is_graph_output()):
                raise AssertionError(f"{node.name}: {name} is not at the graph's edge")
            value.type = ir.TensorType(KINDS[PLUGIN_CODE_DTYPE])
    # Folded, they are float32 in the file; constants are cast while an engine is built.
    for name in (*FIRST_LAYERS, FOLDED_BIAS):
        place = inputs.index(name) if name in inputs else None
        value = None if place is None else node.inputs[place]
        if place is None or value is None or value.dtype == kind:
            continue
        cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{node.name}.{name}.cast")
        graph.insert_before(node, cast)
        node.replace_input_with(place, cast.outputs[0])


def _write_out(
    graph: ir.Graph, choice: ir.Node, call: ir.Node, layer: Layer, step: bool, prefix: str
) -> None:
    """Replace the choice by a body in standard operators."""
    names = node_inputs(layer.config, layer.kind)
    given: Values = {}
    for name, value in zip(names, call.inputs, strict=True):
        if value is None:
            raise AssertionError(f"{call.name}: input {name} is not given")
        given[name] = value
    coded: tuple[str, ...] = ()
    if layer.config.quantization is not None:
        layer, coded = dataclasses.replace(layer, code_dtype=CODE_DTYPE), CODED_ARRAYS
    scratch = ir.Graph([], [], nodes=[], name=prefix)
    build = Builder(scratch, prefix)
    for name in coded:
        given[name] = build.cast(given[name], CODE_DTYPE)
    results: list[Value]
    if step:
        results = step_body(build, layer, given)
    else:
        results = chunk_body(build, layer, given, OPSET, attend_at_once)
    outputs = node_outputs(layer.config)
    if len(results) != len(outputs):
        raise AssertionError(f"{call.name}: {len(results)} results")
    for name in coded:
        place = outputs.index(name)
        results[place] = build.cast(results[place], "uint8")
    splice(graph, choice, scratch, dict(enumerate(results)))


def _fix_sequence(graph: ir.Graph) -> None:
    for value in graph.inputs[:2]:
        value.shape = ir.Shape([(value.shape or ["batch"])[0], 1])
    for node in graph:
        if node.op_type == STEP:
            out = node.outputs[0]
            if out.shape is not None:
                out.shape = ir.Shape([out.shape[0], out.shape[1], 1, out.shape[3]])


def _forget_shapes(graph: ir.Graph) -> None:
    """Drop the recorded shapes, which are for any number of tokens; inference finds closer ones."""
    for node in graph:
        if node.op_type != STEP:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None


def _inferred(model: ir.Model) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True)
