"""TensorRT's own registry takes the built libraries, and its creator makes plugins."""

import subprocess
import sys

import pytest

import less_cache as lc
from tests.plugins.built import built

# A process of its own each: a library that crashes, or stays, must not reach other tests.
CREATE = """
import ctypes, sys
import numpy as np
import tensorrt_lean_bindings as trt

def fields(**values):
    made = []
    for name, value in values.items():
        if isinstance(value, str):
            data, kind = np.frombuffer(value.encode(), dtype=np.int8), trt.PluginFieldType.CHAR
        elif isinstance(value, float):
            data, kind = np.array([value], np.float32), trt.PluginFieldType.FLOAT32
        else:
            data, kind = np.array([value], np.int32), trt.PluginFieldType.INT32
        alive.append(data)
        made.append(trt.PluginField(name, data, kind))
    return trt.PluginFieldCollection(made)

alive = []
registry = trt.get_plugin_registry()
"""

USE = """
creator = registry.get_creator("LessAttention", "1", "")
assert creator is not None, "no creator"
assert [field.name for field in creator.field_names] == list(coded)
for attributes in (layer, coded):
    plugin = creator.create_plugin("layer", fields(**attributes), trt.TensorRTPhase.BUILD)
    assert plugin is not None, "no plugin"
wrong = fields(**{**layer, "gain": 9})
assert creator.create_plugin("wrong", wrong, trt.TensorRTPhase.BUILD) is None
bare = {name: value for name, value in coded.items() if name != "model_dtype"}
assert creator.create_plugin("bare", fields(**bare), trt.TensorRTPhase.BUILD) is None
del plugin
"""


def node(codes: lc.Quantization | None = None) -> dict[str, object]:
    """The attributes that the ONNX parser passes on, as the exporter writes them."""
    nodes = pytest.importorskip("exporters.onnx.nodes")
    config = lc.CacheConfig(1, 4, 2, 64, capacity=64, policy=lc.H2O(), rank=8, quantization=codes)
    attributes = nodes.node_attributes(config.layer(0), "exp")
    return {name: value for name, value in attributes.items() if not name.startswith("plugin_")}


def run(code: str) -> str:
    probe = subprocess.run(
        [sys.executable, "-c", "import tensorrt_lean_bindings"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("needs the packages tensorrt-lean-cu13-libs and -bindings")
    layers = f"layer = {node()!r}\ncoded = {node(lc.Quantization(3, 3))!r}\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{layers}{CREATE}{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_load_library_registers_the_creator_until_it_is_deregistered():
    library = str(built("libless_cache_trt.so"))
    said = run(
        f"handle = registry.load_library({library!r})\n"
        + USE
        + "del creator\n"
        + "registry.deregister_library(handle)\n"
        + 'assert registry.get_creator("LessAttention", "1", "") is None\n'
    )
    assert "gain: got 9, expected 0 to 2 (in wrong)" in said


def test_opening_the_static_library_registers_the_creator():
    library = str(built("libless_cache_trt_static.so"))
    run(f"ctypes.CDLL({library!r})\nctypes.CDLL({library!r})\n" + USE)


def test_without_tensorrt_the_static_library_says_so():
    library = str(built("libless_cache_trt_static.so"))
    code = f"import ctypes; ctypes.CDLL({library!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "LessAttention is not registered: no TensorRT" in result.stderr
