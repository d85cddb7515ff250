"""One layer's operators as files of their own, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxscript import ir

import less_cache as lc
from exporters.onnx import nodes
from exporters.onnx.parts import Layer
from less_cache import ops
from tests.helpers import Held, held_by


def single_node_model(
    layer: lc.config.LayerConfig,
    kind: str | None,
    op: str,
    maps: dict[str, np.ndarray],
    *,
    opset: int = 20,
    overload: str = "",
    window: int = 0,
) -> onnx.ModelProto:
    """A model of one node of ours, with its function."""
    body = nodes.function(op, Layer(layer, kind, window), opset, overload)
    tokens = 1 if op == nodes.STEP else "tokens"
    state = lc.state.allocate(layer, 1, numpy=True)
    inputs = {}
    for name in nodes.node_inputs(layer, kind):
        if name in ("q", "k", "v"):
            heads = layer.query_heads if name == "q" else layer.kv_heads
            dtype, shape = np.dtype(layer.dtype), ["batch", heads, tokens, layer.head_dim]
        elif name == "mask":
            dtype, shape = np.dtype(np.int32), ["batch", tokens]
        elif name in maps:
            dtype, shape = maps[name].dtype, list(maps[name].shape)
        else:
            array = getattr(state, name)
            dtype, shape = array.dtype, ["batch", *array.shape[1:]]
        inputs[name] = ir.val(name, ir.DataType.from_numpy(dtype), ir.Shape(shape))
    names = nodes.node_outputs(layer)
    node = ir.node(
        op,
        list(inputs.values()),
        nodes.node_attributes(layer, kind),
        domain=nodes.DOMAIN,
        overload=overload,
        num_outputs=len(names),
    )
    for value, name in zip(node.outputs, names, strict=True):
        like = inputs["q" if name == "out" else name]
        value.name, value.type, value.shape = f"present_{name}", like.type, like.shape
    graph = ir.Graph(
        list(inputs.values()),
        node.outputs,
        nodes=[node],
        opset_imports={"": opset, nodes.DOMAIN: 1},
        name="layer",
    )
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[body]))


def session_of(model: onnx.ModelProto, *, optimize: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class OnnxLayers:
    """Layers whose appends ONNX Runtime computes; spoken to like a conformance `Runner`."""

    def __init__(
        self, config: lc.CacheConfig, maps: lc.FeatureMaps | None, batch: int, **options: Any
    ) -> None:
        self.config, self.options = config, options
        self.kind = None if maps is None else maps.kind
        self.maps = [
            {name: x.numpy() for name, x in layer.tensors.items()} for layer in maps or ()
        ] or [{}] * config.num_layers
        self.states = [
            lc.state.allocate(config.layer(i), batch, numpy=True) for i in range(config.num_layers)
        ]
        self.sessions: dict[tuple[int, str], ort.InferenceSession] = {}

    def append(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any = None, *, layer: int = 0
    ) -> np.ndarray:
        config, state = self.config.layer(layer), self.states[layer]
        op = nodes.STEP if q.shape[2] == 1 else nodes.CHUNK
        if (layer, op) not in self.sessions:
            model = single_node_model(config, self.kind, op, self.maps[layer], **self.options)
            onnx.checker.check_model(model, full_check=True)
            self.sessions[layer, op] = session_of(model)
        mask = np.ones((q.shape[0], q.shape[2])) if mask is None else mask
        given = {
            **{name: x.astype(config.dtype) for name, x in (("q", q), ("k", k), ("v", v))},
            "mask": mask.astype(np.int32),
            "length": state.length,
            **{name: getattr(state, name) for name in ops.state_names(config)},
            **self.maps[layer],
        }
        out, *arrays = self.sessions[layer, op].run(None, given)
        for name, array in zip(ops.state_names(config), arrays, strict=True):
            setattr(state, name, array)
        state.length = state.length + mask.sum(1).astype(np.int32)
        return out.astype(np.float64)

    def held(self, layer: int = 0) -> Held:
        return held_by(self.states[layer])
