"""One layer's operators as files of their own, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import ir

import less_cache as lc
from exporters.onnx import nodes
from exporters.onnx.parts import Layer
from less_cache import ops
from less_cache.layer_config import LayerConfig, Run
from less_cache.quantization.transforms import LayerTransforms, layer_transforms
from tests.helpers import Held, held_by


def single_node_model(
    layer: LayerConfig,
    kind: str | None,
    op: str,
    maps: dict[str, np.ndarray],
    *,
    opset: int = 20,
    overload: str = "",
    window: int = 0,
) -> onnx.ModelProto:
    """A model of one node of ours, with its function; all heads have the same capacity."""
    body = nodes.function(op, Layer(layer, kind, window), opset, overload)
    tokens = 1 if op == nodes.STEP else "tokens"
    state = lc.state.allocate(layer, 1, numpy=True)
    dense = {**state.of_run(layer.runs[0]).named(), "length": state.length}
    inputs = {}
    for name in nodes.node_inputs(layer, kind):
        if name in ("q", "k", "v"):
            heads = layer.query_heads if name == "q" else layer.kv_heads
            dtype, shape = token_dtype(layer), ["batch", heads, tokens, layer.head_dim]
        elif name == "mask":
            dtype, shape = np.dtype(np.int32), ["batch", tokens]
        elif name == "shift":
            dtype, shape = np.dtype(np.float32), ["batch", layer.query_heads, tokens]
        elif name in maps:
            dtype, shape = maps[name].dtype, list(maps[name].shape)
        else:
            array = dense[name]
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


def token_dtype(layer: LayerConfig) -> np.dtype:
    """That of what comes in: as the model has it, but float32 in the basis of codes."""
    return np.dtype(layer.dtype if layer.quantization is None else "float32")


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
    """Layers whose calls ONNX Runtime computes; spoken to like a conformance `Runner`.

    Heads of equal capacity side by side are a node of their own, as in an exported file. What is
    around the node in such a file, the bases of codes, is torch's here.
    """

    def __init__(
        self,
        config: lc.CacheConfig,
        maps: lc.FeatureMaps | None,
        batch: int,
        transforms: lc.Transforms | None = None,
        **options: Any,
    ) -> None:
        self.config, self.options = config, options
        self.maps = list(maps) if maps is not None else [None] * config.num_layers
        self.kinds = [None if own is None else own.kind for own in self.maps]
        given = transforms or [None] * config.num_layers
        self.bases = [layer_transforms(config.layer(i), basis) for i, basis in enumerate(given)]
        for i, basis in enumerate(self.bases):
            if basis is not None and self.maps[i] is not None:
                self.maps[i] = basis.fold(self.maps[i].to(dtype=torch.float32))
        self.states = [
            lc.state.allocate(config.layer(i), batch, numpy=True) for i in range(config.num_layers)
        ]
        self.sessions: dict[tuple[int, int, str], ort.InferenceSession] = {}

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any = None, *, layer: int = 0
    ) -> np.ndarray:
        config, state = self.config.layer(layer), self.states[layer]
        mask = np.ones((q.shape[0], q.shape[2])) if mask is None else mask
        basis, shift = self.bases[layer], None
        if basis is not None:
            q, k, v, shift = self._enter(basis, q, k, v)
        outs = []
        for run in config.runs:
            heads = {"q": q[:, run.query_heads], "k": k[:, run.kv_heads], "v": v[:, run.kv_heads]}
            maps = self._maps(layer, run)
            held = state.of_run(run).named()
            given = {
                **{name: x.astype(token_dtype(config)) for name, x in heads.items()},
                "mask": mask.astype(np.int32),
                "length": state.length,
                **{name: held[name] for name in ops.state_names(config)},
                **maps,
            }
            if "shift" in nodes.node_inputs(config, self.kinds[layer]):
                given["shift"] = shift[:, run.query_heads].astype(np.float32)
            op = nodes.STEP if q.shape[2] == 1 else nodes.CHUNK
            out, *arrays = self._session(layer, run, op, maps).run(None, given)
            for name, array in zip(ops.state_names(config), arrays, strict=True):
                held[name][...] = array
            outs.append(out)
        state.length = state.length + mask.sum(1).astype(np.int32)
        out = np.concatenate(outs, 1).astype(np.float64)
        if basis is None:
            return out
        left = basis.to(dtype=torch.float64).leave(torch.from_numpy(out)).numpy()
        return np.where(mask[:, None, :, None] != 0, left, 0)

    def _enter(self, basis: LayerTransforms, *tokens: np.ndarray) -> list[Any]:
        # What padding holds does not matter, but may be no number.
        wide = basis.to(dtype=torch.float64)
        found = wide.enter(*(torch.from_numpy(x).double() for x in tokens))
        return [None if x is None else x.numpy() for x in found]

    def _maps(self, layer: int, run: Run) -> dict[str, np.ndarray]:
        maps = self.maps[layer]
        if maps is None:
            return {}
        own = maps.heads(run.query_heads, run.kv_heads)
        return {name: tensor.numpy() for name, tensor in own.tensors.items()}

    def _session(
        self, layer: int, run: Run, op: str, maps: dict[str, np.ndarray]
    ) -> ort.InferenceSession:
        key = (layer, run.first, op)
        if key not in self.sessions:
            model = single_node_model(run.layer, self.kinds[layer], op, maps, **self.options)
            onnx.checker.check_model(model, full_check=True)
            self.sessions[key] = session_of(model)
        return self.sessions[key]

    def held(self, layer: int = 0) -> Held:
        return held_by(self.states[layer], self.config.layer(layer))
