"""Adding nodes to a graph, each by the name of its operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnxscript import ir

Value = ir.Value

KINDS = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


class Builder:
    """Adds nodes to the end of a graph.

    ``build("Add", x, y)`` is the output of a new node. Names of values begin with `prefix`, which
    must be unique in a file.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def __call__(self, op: str, *inputs: Value | None, **attributes: Any) -> Value:
        """The output of a new node that has one."""
        return self.many(op, inputs, 1, **attributes)[0]

    def many(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: int,
        *,
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> list[Value]:
        """The outputs of a new node."""
        node = ir.node(
            op,
            list(inputs),
            attributes,
            domain=domain,
            overload=overload,
            num_outputs=outputs,
            name=f"{self.prefix}_{op}_{self.count}",
        )
        for value in node.outputs:
            value.name = f"{self.prefix}_{self.count}"
            self.count += 1
        self.graph.append(node)
        return list(node.outputs)

    def constant(self, numbers: Any, kind: str) -> Value:
        """A constant of one of `KINDS`; the same one if asked for again."""
        array = np.asarray(numbers, dtype=KINDS[kind].numpy())
        key = (kind, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self("Constant", value=ir.tensor(array, dtype=KINDS[kind]))
        return self._constants[key]

    def ints(self, *numbers: int) -> Value:
        """A constant [n] of int64: axes, shapes, bounds."""
        return self.constant(numbers, "int64")

    def dim(self, value: Value, axis: int) -> Value:
        """The size of one axis, as [1] int64."""
        return self("Shape", value, start=axis, end=axis + 1)

    def cast(self, value: Value, kind: str, given: str | None = None) -> Value:
        """The value as another kind; itself if it is known to be of that kind, `given`."""
        return value if kind == given else self("Cast", value, to=KINDS[kind])

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        """The value with axes of size 1 put in."""
        return self("Unsqueeze", value, self.ints(*axes))

    def reshape(self, value: Value, *shape: int) -> Value:
        """The value in another shape, in which 0 keeps the size of that axis."""
        return self("Reshape", value, self.ints(*shape))

    def take(self, array: Value, index: Value, size: int | None = None) -> Value:
        """``array[b, h, index]`` along the slots; `size` is that of a further axis."""
        if size is not None:
            index = self.spread(index, size)
        return self("GatherElements", array, index, axis=2)

    def spread(self, index: Value, size: int) -> Value:
        """[B, Hkv, N] -> [B, Hkv, N, size]."""
        return self("Expand", self.unsqueeze(index, 3), self.ints(1, 1, 1, size))

    def put(self, array: Value, index: Value, value: Value) -> Value:
        """The array with ``array[b, h, index] = value``."""
        return self("ScatterElements", array, index, value, axis=2)
