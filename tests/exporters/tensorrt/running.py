"""The fake's runtime: an execution context runs the graph on the CPU, over the bound memory.

It refuses what a real engine could not do: shapes outside of the profile, tensors that are not
bound, and outputs over inputs where no plugin says that it works in place.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from exporters.onnx.nodes import STEP
from exporters.tensorrt.operators import types_of

MODEL = "model.onnx"
FLOAT, UINT8, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT8
PLAN = b"plan:"


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        if not serialized_engine.startswith(PLAN):
            return self._world.error(self._logger, "Magic tag does not match")
        plan = json.loads(serialized_engine[len(PLAN) :])
        model = onnx.load(plan["graph"], load_external_data=False)
        if any(node.domain for node in model.graph.node) and not self._world.plugins:
            return self._world.error(self._logger, "no plugin LessAttention")
        made = {"_plan": plan, "_model": model, "_logger": self._logger}
        return self._world.make("ICudaEngine", **made)


class Engine:
    @property
    def num_io_tensors(self) -> int:
        return len(_tensors(self))

    def get_tensor_name(self, index: int) -> str:
        return _tensors(self)[index].name

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {value.name: value.type.tensor_type.elem_type for value in _tensors(self)}
        return self._world.dtype(kinds[name])

    def create_execution_context(self) -> Any:
        return self._world.make(
            "IExecutionContext",
            _engine=self,
            _session=session_of(Path(self._plan["graph"])),
            _given={},
            _addresses={},
        )


class Context:
    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, most = self._engine._plan["shapes"][name]
        if len(shape) != len(least) or any(
            not a <= n <= b for a, n, b in zip(least, shape, most, strict=True)
        ):
            self._world.error(self._engine._logger, f"{name}: {shape} outside of the profile")
            return False
        self._given[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        session, log = self._session, self._engine._logger
        kinds = {value.name: value.type.tensor_type.elem_type for value in _tensors(self._engine)}
        inputs = {}
        for node in session.get_inputs():
            if node.name not in self._given or node.name not in self._addresses:
                self._world.error(log, f"{node.name} is not bound")
                return False
            inputs[node.name] = _view(
                self._addresses[node.name], self._given[node.name], kinds[node.name]
            )
        places = {address: name for name, address in self._addresses.items() if name in inputs}
        for node in session.get_outputs():
            shared = places.get(self._addresses[node.name])
            if shared is not None and not _may_share(self._engine, shared, node.name):
                self._world.error(log, f"{node.name} is bound over {shared}")
                return False
        copies = {name: array.copy() for name, array in inputs.items()}
        names = [node.name for node in session.get_outputs()]
        for name, array in zip(names, session.run(names, copies), strict=True):
            _view(self._addresses[name], array.shape, kinds[name])[...] = array
        return True


def _may_share(engine: Any, past: str, present: str) -> bool:
    """Whether one plugin, and nothing else, reads this input and writes that output.

    TensorRT knows of it or not: the plugin is right at one address.
    """
    own = present.startswith("present.") and past == present.replace("present.", "past.", 1)
    nodes = engine._model.graph.node
    users = [node for node in nodes if past in node.input or present in node.output]
    return own and len(users) == 1 and users[0].op_type == STEP


def _tensors(engine: Any) -> list[Any]:
    return [*engine._model.graph.input, *engine._model.graph.output]


def _view(address: int, shape: Any, kind: int) -> np.ndarray:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    count = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_char * count).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


def _cast_for_functions(graph: Any) -> None:
    """What only the plugin takes as it is: bytes of codes as int8, and narrow maps over codes."""
    kinds = types_of(graph)
    nodes = []
    for node in graph.node:
        after = []
        if node.op_type == STEP and any(a.name == "transform" for a in node.attribute):
            for place, name in enumerate(node.input):
                wanted = {"INT8": UINT8, "FP16": FLOAT, "BF16": FLOAT}.get(kinds.get(name, ""))
                if wanted is not None and "_scales" not in name:
                    node.input[place] = f"{name}.cast"
                    nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}.cast"], to=wanted))
            for place, name in enumerate(node.output):
                if kinds.get(name) == "INT8":
                    node.output[place] = f"{name}.bytes"
                    after.append(onnx.helper.make_node("Cast", [f"{name}.bytes"], [name], to=INT8))
        nodes += [node, *after]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def session_of(path: Path) -> Any:
    """The graph, with the exported file's functions in the plugin's place."""
    model = onnx.load(path, load_external_data=False)
    if any(node.domain for node in model.graph.node):
        exported = onnx.load(path.parent / MODEL, load_external_data=False)
        _cast_for_functions(model.graph)
        model.functions.extend(exported.functions)
        del model.opset_import[:]
        model.opset_import.extend(exported.opset_import)
        path = path.with_name("runnable.onnx")
        onnx.save(model, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # A few steps of a tiny model are worth no optimisation.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
