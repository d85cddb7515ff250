"""Which operators and types TensorRT's ONNX parser takes, as far as our graphs use them.

The list is that of the parser's own documentation for TensorRT 10.0; later versions only added to
it. Graphs are declared with the newest opset of that version.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from exporters.onnx.nodes import STEP

OPSET = 20
"""The newest of ONNX that TensorRT 10.0's parser takes."""

_NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
_FLOATS = frozenset({"FP32", "FP16", "BF16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ALL = _NUMBERS | {"BOOL"}

# fmt: off
_OF_FLOATS = (
    "Clip", "Cos", "CumSum", "Einsum", "Erf", "Exp", "Floor", "Gelu", "Gemm", "LayerNormalization",
    "Log", "MatMul", "Pow", "Reciprocal", "Round", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt",
    "Tanh",
)
_OF_NUMBERS = (
    "Abs", "Add", "ArgMax", "ArgMin", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Pad", "Range", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceSum", "ScatterElements", "ScatterND", "Sub", "TopK",
    "Trilu",
)
_OF_ALL = (
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze", "Where",
)
# fmt: on

SUPPORTED: dict[str, frozenset[str]] = {
    **dict.fromkeys(_OF_FLOATS, _FLOATS),
    **dict.fromkeys(_OF_NUMBERS, _NUMBERS),
    **dict.fromkeys(_OF_ALL, _ALL),
    "Pad": frozenset({"FP32", "FP16"}),
    # At an engine's edge, to and from floats.
    "Cast": _ALL | {"UINT8"},
    **dict.fromkeys(("And", "Not", "Or", "Xor"), frozenset({"BOOL"})),
}
"""The types that an operator's data may have."""

_CONSTANT_INPUTS = {
    "CumSum": 1,
    "ReduceL2": 1,
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceSum": 1,
    "Slice": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
"""Inputs, by place, that must be constants: axes."""


def check_operators(model: onnx.ModelProto) -> None:
    """Check that the parser takes every node of a graph.

    Parameters
    ----------
    model
        With the types of all its values, as shape inference finds them.

    Raises
    ------
    ValueError
        If the parser does not know an operator, or does not take it with this type.
    """
    if problems := sorted(set(_problems(model.graph))):
        raise ValueError(
            "model: TensorRT's ONNX parser does not take " + "; ".join(problems) + ". Exporting "
            f"with opset={OPSET} may use other operators"
        )


def types_of(graph: onnx.GraphProto) -> dict[str, str]:
    """The type of each value of a graph, as TensorRT's documentation calls it."""
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        found[value.name] = value.type.tensor_type.elem_type
    names = {name: onnx.TensorProto.DataType.Name(kind) for name, kind in found.items()}
    return {name: _NAMES.get(kind, kind) for name, kind in names.items()}


def _problems(graph: onnx.GraphProto) -> Iterator[str]:
    types = types_of(graph)
    constants = {tensor.name for tensor in graph.initializer}
    constants.update(node.output[0] for node in graph.node if node.op_type == "Constant")
    for node in graph.node:
        op = node.op_type
        if op == STEP:
            # Not standard: the plugin takes it.
            continue
        if node.domain or op not in SUPPORTED:
            yield f"{node.domain or 'ai.onnx'}.{op}"
            continue
        for name in _data(node):
            if types.get(name) not in SUPPORTED[op]:
                yield f"{op} of {types.get(name, 'an unknown type')}"
        place = _CONSTANT_INPUTS.get(op)
        if place is not None and place < len(node.input) and node.input[place] not in constants:
            yield f"{op} whose axes are no constant"


def _data(node: onnx.NodeProto) -> list[str]:
    """The values to which an operator's listed types apply."""
    if node.op_type == "Constant":
        return [node.output[0]]
    if node.op_type == "Cast":
        return [node.input[0], node.output[0]]
    if node.op_type == "Where":
        return list(node.input[1:])
    return [node.input[0]]
