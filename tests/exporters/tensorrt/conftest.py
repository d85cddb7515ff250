"""TensorRT as the fake has it, and a CPU in the GPU's place."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

from exporters.onnx import OnnxDecoder, export_decoder
from tests.integrations.models import build, less

from .fake import fake_tensorrt

STREAM = 0x5EED
C = 8
"""Slots of the model's cache."""

GPU = {"name": "Fake", "capability": [9, 0]}


CURRENT = [0]
"""The current GPU."""


@contextlib.contextmanager
def selected(index):
    """`exporters.tensorrt.cuda.selected` without CUDA."""
    before, CURRENT[0] = CURRENT[0], index
    yield
    CURRENT[0] = before


class CpuDevice:
    """`exporters.tensorrt.cuda.Device` without CUDA; a captured graph is the work itself."""

    captured = 0

    def __init__(self, index):
        self.handle = STREAM

    @contextlib.contextmanager
    def active(self):
        yield

    def empty(self, shape, dtype):
        # Nothing may count on what was there before.
        filled = torch.empty(tuple(shape), dtype=dtype)
        return filled.fill_(float("nan") if dtype.is_floating_point else 77)

    def put(self, array):
        return array.clone(memory_format=torch.contiguous_format)

    def capture(self, work):
        CpuDevice.captured += 1
        return work


@pytest.fixture(scope="package", autouse=True)
def trt():
    """The fake module, in place of the real one for the modules that import it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("exporters.tensorrt")]:
            patch.delitem(sys.modules, name)
        module = fake_tensorrt()
        patch.setitem(sys.modules, "tensorrt", module)
        from exporters.tensorrt import build, runtime

        for place in (build, runtime):
            patch.setattr(place, "device_info", lambda index: GPU)
        patch.setattr(build, "selected", selected)
        patch.setattr(runtime, "Device", CpuDevice)
        yield module


@pytest.fixture(autouse=True)
def _forgetful(trt):
    """Each test finds no plugin registered, and no calls recorded."""
    trt.calls.clear()
    trt.world.plugins.clear()
    trt.world.fail_build = ""
    trt.world.on_step = lambda: None
    CpuDevice.captured = 0


@pytest.fixture(scope="package")
def library(trt, tmp_path_factory):
    """A plugin library that the fake can load."""
    path = tmp_path_factory.mktemp("plugin") / "libless_cache_plugin.so"
    path.write_bytes(b"library")
    trt.world.libraries = AnyFolder(path.name)
    return path


@pytest.fixture(scope="session")
def parts():
    model = build("llama", num_hidden_layers=1)
    return model, *less(model, capacity=C)


@pytest.fixture(scope="session")
def exported(parts, tmp_path_factory):
    return export_decoder(*parts, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="package")
def engines(trt, exported, library, tmp_path_factory):
    from exporters.tensorrt import build_engines

    out = tmp_path_factory.mktemp("engines")
    return build_engines(exported, out, max_batch=3, max_prompt=64, plugin=library, progress=False)


@pytest.fixture(scope="package")
def standard(trt, exported, tmp_path_factory):
    from exporters.tensorrt import build_engines

    out = tmp_path_factory.mktemp("standard")
    return build_engines(exported, out, max_batch=3, max_prompt=64, progress=False)


@pytest.fixture(scope="session")
def onnx_side(exported):
    return OnnxDecoder(exported, threads=1)


@pytest.fixture
def decoder(engines):
    from exporters.tensorrt import TensorRTDecoder

    return TensorRTDecoder(engines)


class AnyFolder(dict):
    """The library's plugins, wherever it was copied to."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __contains__(self, path):
        return path.endswith(self.name)

    def __getitem__(self, path):
        return {("LessAttention", "1")}
