"""Operators that TensorRT's parser lacks or defines more loosely, written in those it has."""

from __future__ import annotations

from collections.abc import Callable

from onnxscript import ir

from exporters.onnx.building import KINDS, Builder, Value
from exporters.onnx.rewriting import splice, stable_order

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def rewrite(model: ir.Model, *, count: bool = False) -> None:
    """Replace, in place, every node for which there is a rule below.

    Parameters
    ----------
    model
        Its values' types must be known.
    count
        Sort by counting how many numbers come before each. This works for any number of them.
    """
    graph = model.graph
    rules = {**_RULES, "TopK": _counted_order} if count else _RULES
    for number, node in enumerate(list(graph)):
        rule = rules.get(node.op_type) if not node.domain else None
        if rule is None:
            continue
        scratch = ir.Graph([], [], nodes=[], name="rewritten")
        results = rule(Builder(scratch, f"trt{number}"), node)
        if results is not None:
            splice(graph, node, scratch, results)


def _is_float(value: Value | None) -> bool:
    return value is not None and value.dtype in FLOATS


def _given(node: ir.Node, place: int) -> Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _needed(node: ir.Node, place: int) -> Value:
    value = _given(node, place)
    if value is None:
        raise AssertionError(f"{node.op_type}: input {place} is not given")
    return value


def _rms_normalization(b: Builder, node: ir.Node) -> dict[int, Value]:
    """Known from TensorRT 10.15 on; its parts are known to all versions, which fuse them."""
    x, scale = _needed(node, 0), _needed(node, 1)
    axis = _integer(node, "axis", -1)
    if axis >= 0:
        raise ValueError(f"model: {node.op_type} from axis {axis} on, expected a negative axis")
    wide = b.cast(x, "float32", _kind(x))
    square = b("ReduceMean", b("Mul", wide, wide), b.ints(*range(axis, 0)), keepdims=1)
    epsilon = b.constant(_number(node, "epsilon", 1e-5), "float32")
    normal = b("Div", wide, b("Sqrt", b("Add", square, epsilon)))
    return {0: b("Mul", b.cast(normal, _kind(x), "float32"), scale)}


def _rotary_embedding(b: Builder, node: ir.Node) -> dict[int, Value]:
    """[B, H, S, D] turned by [B, S, D / 2] angles, in the operators of opset 20."""
    x = _needed(node, 0)
    size = x.shape[-1] if x.shape is not None and len(x.shape) == 4 else None
    rotated = _integer(node, "rotary_embedding_dim", 0)
    if (
        not isinstance(size, int)
        or rotated not in (0, size)
        or _integer(node, "interleaved", 0)
        or _given(node, 3) is not None
    ):
        raise ValueError(
            f"model: {node.op_type} of a kind that TensorRT is not given; export with opset=20"
        )
    bounds = [b.ints(0), b.ints(size // 2), b.ints(size)]
    last = b.ints(3)
    first = b("Slice", x, bounds[0], bounds[1], last)
    second = b("Slice", x, bounds[1], bounds[2], last)
    cos, sin = (b.unsqueeze(_needed(node, place), 1) for place in (1, 2))
    turned = b("Sub", b("Mul", first, cos), b("Mul", second, sin))
    other = b("Add", b("Mul", second, cos), b("Mul", first, sin))
    return {0: b("Concat", turned, other, axis=-1)}


def _cumulative_sum(b: Builder, node: ir.Node) -> dict[int, Value] | None:
    """Listed for floats alone, which count tokens exactly up to 2^24."""
    x, axis = _needed(node, 0), _needed(node, 1)
    if _is_float(x):
        return None
    attributes = {name: _integer(node, name, 0) for name in ("exclusive", "reverse")}
    total = b("CumSum", b.cast(x, "float32"), axis, **attributes)
    return {0: b.cast(total, _kind(x))}


def _clip(b: Builder, node: ir.Node) -> dict[int, Value] | None:
    """Listed for floats alone; `Max` and `Min` are not."""
    x = _needed(node, 0)
    if _is_float(x):
        return None
    for place, op in ((1, "Max"), (2, "Min")):
        if (bound := _given(node, place)) is not None:
            x = b(op, x, bound)
    return {0: x}


def _top_k(b: Builder, node: ir.Node) -> dict[int, Value] | None:
    """ONNX says that the first of equal numbers comes first; TensorRT's layer promises nothing."""
    x, size = _needed(node, 0), _needed(node, 1)
    if not _is_float(x) or node.outputs[0].uses() or _integer(node, "largest", 1):
        return None
    # At most 3840 numbers in at most 3840 groups: float32 has exact products of the two.
    return {1: stable_order(b, x, size, _integer(node, "axis", -1), "float32")}


def _counted_order(b: Builder, node: ir.Node) -> dict[int, Value] | None:
    """Sort by each number's rank: how many are less, or equal and earlier.

    TensorRT sorts only a limited number, but compares as many as there is memory for.
    """
    x = _needed(node, 0)
    axis = _integer(node, "axis", -1)
    if node.outputs[0].uses() or _integer(node, "largest", 1) or axis < 0:
        return None
    one, other = b.unsqueeze(x, axis + 1), b.unsqueeze(x, axis)
    span = b("Squeeze", b("Shape", x, start=axis, end=axis + 1), b.ints(0))
    place = b("Range", b.constant(0, "int64"), span, b.constant(1, "int64"))
    earlier = b("Less", b.unsqueeze(place, 0), b.unsqueeze(place, 1))
    before = b("Or", b("Less", other, one), b("And", b("Equal", other, one), earlier))
    rank = b("ReduceSum", b.cast(before, "float32"), b.ints(axis + 1), keepdims=0)
    rank = b.cast(rank, "int64")
    places = b("Expand", place, b("Shape", x))
    return {1: b("ScatterElements", places, rank, places, axis=axis)}


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _kind(value: Value) -> str:
    for kind, dtype in KINDS.items():
        if dtype == value.dtype:
            return kind
    raise ValueError(f"model: {value.name} is of type {value.dtype}, expected one of {list(KINDS)}")


_RULES: dict[str, Callable[[Builder, ir.Node], dict[int, Value] | None]] = {
    "Clip": _clip,
    "CumSum": _cumulative_sum,
    "RMSNormalization": _rms_normalization,
    "RotaryEmbedding": _rotary_embedding,
    "TopK": _top_k,
}
