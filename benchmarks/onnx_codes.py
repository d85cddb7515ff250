"""A layer's step over codes in ONNX Runtime, unpacked in four ways, beside float32 slots.

``python benchmarks/onnx_codes.py`` times one node of ours, `LessAttention`, on this CPU. Its body
unpacks as `exporters.onnx.codes` does; here other ways take the place of that.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import typer
from onnxscript import ir
from rich.console import Console
from rich.table import Table

if __package__ in (None, ""):
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import less_cache as lc
from benchmarks.measuring import WARM_UP, spread, surroundings
from benchmarks.options import numbers
from exporters.onnx import codes, nodes
from exporters.onnx.building import KINDS, Builder, Value
from exporters.onnx.parts import Layer
from less_cache.layer_config import LayerConfig
from less_cache.quantization.layout import CodeLayout, Plane

RESULTS = Path(__file__).parent / "results"
KV_HEADS, HEAD_DIM = 4, 128
"""Of the model of ``benchmarks/decode.py``."""

console = Console()


def by_shifts(
    b: Builder, layout: CodeLayout, plane: Plane, packed: Value, wide: str
) -> list[Value]:
    """Bytes shifted and masked."""
    return [b.cast(field, wide) for field in _byte_fields(b, layout, plane, packed)]


def by_tables(
    b: Builder, layout: CodeLayout, plane: Plane, packed: Value, wide: str
) -> list[Value]:
    """Each field looked up in a table of 256 numbers."""
    index = b.cast(_plane(b, layout, plane, packed), "int32")
    found = []
    for place in range(0, 8, plane.width):
        table = (np.arange(256) >> place) & (2**plane.width - 1)
        found.append(b("Gather", b.constant(table, wide), index))
    return found


def integer_products(b: Builder, layout: CodeLayout, q: Value, packed: Value, wide: str) -> Value:
    """As `codes.products`, but of queries in 8 bits: what integers cost, not what is exact."""
    spread_out = b("MatMul", q, b.constant(codes._places(layout), wide))
    total = b("MatMul", q, b.constant(-layout.centers[:, None], wide))
    parts = [f for plane in layout.planes for f in _byte_fields(b, layout, plane, packed)]
    for share, part in zip(_shares(b, layout, spread_out), parts, strict=True):
        turned = b("Transpose", part, perm=[0, 1, 3, 2])
        total = b("Add", _integer_product(b, share, turned, wide), total)
    return total


def integer_mixed(
    b: Builder, layout: CodeLayout, weights: Value, packed: Value, wide: str
) -> Value:
    """As `codes.mixed`, but of weights in 8 bits."""
    parts = [f for plane in layout.planes for f in _byte_fields(b, layout, plane, packed)]
    sums = [_integer_product(b, weights, part, wide) for part in parts]
    joined = sums[0] if len(sums) == 1 else b("Concat", *sums, axis=3)
    levels = b("MatMul", joined, b.constant(codes._places(layout).T, wide))
    total = b("ReduceSum", weights, b.ints(3))
    return b("Sub", levels, b("Mul", total, b.constant(layout.centers, wide)))


def _integer_product(b: Builder, x: Value, part: Value, wide: str) -> Value:
    largest = b("ReduceMax", b("Abs", x), b.ints(0, 1, 2, 3))
    scale = b("Div", b.constant(127, wide), b("Max", largest, b.constant(1e-30, wide)))
    digits = b("Cast", b("Round", b("Mul", x, scale)), to=ir.DataType.INT8)
    return b("Div", b.cast(b("MatMulInteger", digits, part), wide), scale)


def _shares(b: Builder, layout: CodeLayout, x: Value) -> list[Value]:
    sizes = [plane.nbytes for plane in layout.planes for _ in range(8 // plane.width)]
    return [x] if len(sizes) == 1 else b.many("Split", [x, b.ints(*sizes)], len(sizes), axis=3)


def _byte_fields(b: Builder, layout: CodeLayout, plane: Plane, packed: Value) -> list[Value]:
    held = _plane(b, layout, plane, packed)
    found = []
    for place in range(0, 8, plane.width):
        field = held
        if place:
            field = b("BitShift", held, b.constant(place, "uint8"), direction="RIGHT")
        if place + plane.width < 8:
            field = b("BitwiseAnd", field, b.constant(2**plane.width - 1, "uint8"))
        found.append(field)
    return found


def _plane(b: Builder, layout: CodeLayout, plane: Plane, packed: Value) -> Value:
    if len(layout.planes) == 1:
        return packed
    bounds = b.ints(plane.offset), b.ints(plane.offset + plane.nbytes)
    return b("Slice", packed, *bounds, b.ints(3))


@contextlib.contextmanager
def _patched(**functions: Callable[..., Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(codes, name, function))
        yield


WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "floats": {},
    "shifts of bytes": {"_fields": by_shifts},
    "tables": {"_fields": by_tables},
    "integer products": {"products": integer_products, "mixed": integer_mixed},
}
"""By name: what is put in the place of functions of `codes`."""


class Step:
    """One node in a session, its state in place, as `OnnxDecoder` has it."""

    def __init__(self, layer: LayerConfig, batch: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        model = ir.to_proto(_model(layer)).SerializeToString()
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(model, options, providers=providers)
        self.binding = self.session.io_binding()
        rng = np.random.default_rng(0)
        self.held = []
        for node in self.session.get_inputs():
            shape = [batch, *node.shape[1:]]
            kind = node.type[len("tensor(") : -1].replace("float", "float32")
            kind = kind.replace("float3216", "float16")
            array = rng.random(shape, dtype=np.float32)
            if node.name == "keys" or node.name == "values":
                array = array * (255 if kind == "uint8" else 1)
            elif node.name == "positions":
                array = np.broadcast_to(np.arange(shape[-1]), shape)
            elif node.name == "length":
                array = np.full(shape, 10_000)
            elif node.name == "mask":
                array = np.ones(shape)
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, kind))
            self.held.append(value)
            self.binding.bind_ortvalue_input(node.name, value)
            if f"present_{node.name}" in {x.name for x in self.session.get_outputs()}:
                self.binding.bind_ortvalue_output(f"present_{node.name}", value)
        self.binding.bind_output("present_out", "cpu")

    def run(self) -> None:
        """One token of each sequence."""
        self.session.run_with_iobinding(self.binding)


def _model(layer: LayerConfig) -> ir.Model:
    body = nodes.function(nodes.STEP, Layer(layer, None), 23, "")
    shapes: dict[str, tuple[str, list[Any]]] = {
        "q": ("float32", [layer.query_heads, 1, layer.head_dim]),
        "k": ("float32", [layer.kv_heads, 1, layer.head_dim]),
        "v": ("float32", [layer.kv_heads, 1, layer.head_dim]),
        "mask": ("int32", [1]),
        "length": ("int32", []),
    }
    for name, (shape, dtype) in lc.arrays.array_shapes(layer).items():
        shapes[name] = (dtype, [layer.kv_heads, layer.capacity, *shape[1:]])
    inputs = {}
    for name in nodes.node_inputs(layer, None):
        dtype, shape = shapes[name]
        inputs[name] = ir.val(name, KINDS[dtype], ir.Shape(["batch", *shape]))
    names = nodes.node_outputs(layer)
    node = ir.node(
        nodes.STEP,
        list(inputs.values()),
        nodes.node_attributes(layer, None),
        domain=nodes.DOMAIN,
        num_outputs=len(names),
    )
    for value, name in zip(node.outputs, names, strict=True):
        like = inputs["q" if name == "out" else name]
        value.name, value.type, value.shape = f"present_{name}", like.type, like.shape
    imports = {"": 23, nodes.DOMAIN: 1}
    graph = ir.Graph(
        list(inputs.values()), node.outputs, nodes=[node], opset_imports=imports, name="layer"
    )
    return ir.Model(graph, ir_version=10, functions=[body])


def main(
    bits: Annotated[str, typer.Option(help="Of keys and values.")] = "2,3,4,8",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    capacity: Annotated[int, typer.Option(min=4, help="Slots a head.")] = 410,
    transform: Annotated[str, typer.Option(help="hadamard or calibrated.")] = "calibrated",
    repeats: Annotated[int, typer.Option(min=4, help="Timed steps.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Of ONNX Runtime.")] = 1,
    json_file: Annotated[Path, typer.Option("--json")] = RESULTS / "onnx_codes.json",
) -> None:
    """Time one layer's step."""
    report: dict[str, Any] = surroundings()
    report["versions"]["onnxruntime"] = ort.__version__
    report["settings"] = {"batch": batch, "capacity": capacity, "transform": transform}
    report["settings"] |= {"threads": threads, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    plain = lc.CacheConfig(1, KV_HEADS, KV_HEADS, HEAD_DIM, capacity, lc.H2O(), rank=0)
    steps = {("float32 slots", 32): Step(plain.layer(0), batch, threads)}
    sizes = {32: plain.layer(0).slot_bytes}
    for count in numbers(bits):
        config = plain.replace(quantization=lc.Quantization(count, count, transform))
        sizes[count] = config.layer(0).slot_bytes
        for name, functions in WAYS.items():
            with _patched(**functions):
                steps[name, count] = Step(config.layer(0), batch, threads)
    calls = {f"{name}/{count}": step.run for (name, count), step in steps.items()}
    times = {name: _timed(call, repeats) for name, call in calls.items()}
    report["results"] = {"times": times, "slot_bytes": sizes}
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=2) + "\n")
    console.print(_table(times, sizes))


def _timed(call: Callable[[], None], repeats: int) -> dict[str, float]:
    """Of the clock and of the processor; the latter hardly feels other work on the machine."""
    seconds, busy = [], []
    for turn in range(-WARM_UP, repeats):
        started, used = time.perf_counter(), time.process_time()
        call()
        if turn >= 0:
            seconds.append(time.perf_counter() - started)
            busy.append(time.process_time() - used)
    return {**spread(seconds), "cpu_ms": statistics.median(busy) * 1e3}


def _table(times: dict[str, dict[str, float]], sizes: dict[int, int]) -> Table:
    table = Table(title="One layer's step, median ms of the processor")
    for heading in ("unpacked by", *(f"{count} bits" for count in sizes)):
        table.add_column(heading, justify="right")
    table.add_row("bytes a slot", *(str(size) for size in sizes.values()))
    for name in ("float32 slots", *WAYS):
        cells = [times.get(f"{name}/{count}") for count in sizes]
        table.add_row(name, *("–" if c is None else f"{c['cpu_ms']:.2f}" for c in cells))
    return table


if __name__ == "__main__":
    typer.run(main)
