"""Codes in standard operators: those of `less_cache.quantization.codes`, and products with them."""

import numpy as np
import pytest
import torch
from onnxscript import ir

from exporters.onnx import codes as nodes
from exporters.onnx.building import KINDS, Builder
from less_cache.quantization import BITS, codes
from less_cache.quantization.layout import PROFILES, code_layout
from tests.exporters.onnx.single_layer import session_of

SIZES = (16, 12, 5)
LAYOUTS = [(*profile, size) for profile in PROFILES for size in SIZES]


def run(build, arrays, outputs):
    """What nodes make of arrays [2, 3, ...], by ONNX Runtime."""
    inputs = {
        name: ir.val(name, ir.DataType.from_numpy(x.dtype), ir.Shape(x.shape))
        for name, x in arrays.items()
    }
    graph = ir.Graph([*inputs.values()], [], nodes=[], opset_imports={"": 20}, name="codes")
    found = build(Builder(graph, "n"), **inputs)
    for value, kind in zip(found, outputs, strict=True):
        value.type = ir.TensorType(KINDS[kind])
        graph.outputs.append(value)
    return session_of(ir.to_proto(ir.Model(graph, ir_version=10))).run(None, arrays)


def drawn(layout, count=9, seed=0):
    """Numbers of uneven channels and sizes, float32; zeros among them."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(2, 3, count, len(layout.bits))) * rng.uniform(0.2, 3, len(layout.bits))
    u *= 10.0 ** rng.integers(-3, 4, (2, 3, count, 1))
    u[0, 0, 0], u[1, 1, 2] = 0, 1e9
    return u.astype(np.float32)


@pytest.mark.parametrize(("kind", "bits", "size"), LAYOUTS)
def test_codes_and_scales_are_those_of_encode(kind, bits, size):
    layout = code_layout(kind, bits, size)
    u = drawn(layout, count=200)
    packed, scales = run(
        lambda b, u: nodes.encode(b, layout, u, "float32", "uint8"), {"u": u}, ("uint8", "float16")
    )
    wanted, wanted_scales = (x.numpy() for x in codes.encode(layout, torch.from_numpy(u)))
    # A mean summed in another order may round to the next scale.
    same = scales == wanted_scales
    assert same.mean() > 0.99
    np.testing.assert_allclose(scales.astype(float), wanted_scales.astype(float), rtol=1.1e-3)
    numbers, expected = (codes.unpack(layout, x[same]) for x in (packed, wanted))
    assert (numbers != expected).mean() < 1e-3
    assert np.abs(numbers.astype(int) - expected).max() <= 1
    assert scales[0, 0, 0] == 0
    assert scales[1, 1, 2] == codes.LARGEST_SCALE


@pytest.mark.parametrize(("kind", "bits", "size"), LAYOUTS)
def test_any_bytes_are_read_as_decode_reads_them(kind, bits, size):
    layout = code_layout(kind, bits, size)
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (2, 3, 9, layout.nbytes)).astype(np.uint8)
    scales = rng.uniform(0, 4, (2, 3, 9)).astype(np.float16)
    wanted = codes.decode(layout, packed, scales, np.float32)
    given = {"packed": packed, "scales": scales}
    (found,) = run(
        lambda b, packed, scales: [nodes.decode(b, layout, packed, scales, "float32")],
        given,
        ("float32",),
    )
    np.testing.assert_array_equal(found, wanted)

    q = rng.normal(size=(2, 3, 4, size)).astype(np.float32)
    weights = rng.uniform(size=(2, 3, 4, 9)).astype(np.float32)
    levels = codes.decode(layout, packed, np.ones_like(scales), np.float64)
    products, mixed = run(
        lambda b, packed, q, weights: [
            nodes.products(b, layout, q, packed, "float32"),
            nodes.mixed(b, layout, weights, packed, "float32"),
        ],
        {"packed": packed, "q": q, "weights": weights},
        ("float32", "float32"),
    )
    # Sums of codes less sums of centers: exact to what float32 has of the former.
    bound = 1e-6 * 2 ** max(layout.bits) * size
    np.testing.assert_allclose(products, q @ levels.swapaxes(2, 3), atol=bound)
    np.testing.assert_allclose(mixed, weights @ levels, atol=bound)


def test_all_widths_are_tried():
    assert {bits for _, bits in PROFILES} == set(BITS)
