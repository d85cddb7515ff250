"""The real thing, where there is a GPU and TensorRT's builder: engines against ONNX Runtime."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
import numpy as np
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.tensorrt import TensorRTDecoder, build_engines
from tests.integrations.models import build, less, prompts

out, plugin = sys.argv[1], sys.argv[2] or None
model = build("llama")
export_decoder(model, *less(model, capacity=8), out + "/onnx")
build_engines(out + "/onnx", out + "/engines", max_batch=2, max_prompt=64, plugin=plugin)
ids, mask = (x.numpy() for x in prompts([20, 5]))
sides = [TensorRTDecoder(out + "/engines"), OnnxDecoder(out + "/onnx", threads=1)]
states = [side.new_state(2) for side in sides]
for step in range(64):
    found, expected = (s.append(t, ids, mask) for s, t in zip(sides, states))
    np.testing.assert_allclose(found, expected, atol=2e-3, err_msg=f"step {step}")
    ids = expected.argmax(1)[:, None]
    mask = np.ones_like(ids)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("plugin", ["", os.environ.get("LESS_CACHE_TRT_PLUGIN")])
def test_engines_do_what_onnx_runtime_does(plugin, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if plugin is None:
        pytest.skip("LESS_CACHE_TRT_PLUGIN does not name the plugin's library")
    # In a process of its own: in this one, tensorrt is the fake.
    probe = subprocess.run([sys.executable, "-c", "import tensorrt"], capture_output=True)
    if probe.returncode:
        pytest.skip("TensorRT's Python package is not installed")
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), plugin], check=True)
