"""The real thing, where there is a GPU and TensorRT's builder: engines against ONNX Runtime."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
import numpy as np
import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.tensorrt import TensorRTDecoder, build_engines
from tests.integrations.models import build, less, prompts

out, plugin = sys.argv[1], sys.argv[2] or None
model = build("llama")
config, maps = less(model, capacity=8)
# A window evicts by position, so that a code at the edge of two levels changes no set.
coded = config.replace(quantization=lc.Quantization(4, 4), policy=lc.SinkWindow(1))
for name, own, atol in (("plain", config, 2e-3), ("coded", coded, 2e-2)):
    onnx = f"{out}/{name}"
    export_decoder(model, own, maps, onnx)
    # Past and present at one address, whether TensorRT is told or not; and at two.
    for alias, one in ((True, True), (False, True), (False, False)) if plugin else ((True, True),):
        engines = f"{onnx}-{alias}"
        build_engines(onnx, engines, max_batch=2, max_prompt=64, plugin=plugin, alias=alias)
        ids, mask = (x.numpy() for x in prompts([20, 5]))
        sides = [TensorRTDecoder(engines, one_address=one), OnnxDecoder(onnx, threads=1)]
        states = [side.new_state(2) for side in sides]
        for step in range(64):
            found, expected = (s.append(t, ids, mask) for s, t in zip(sides, states))
            told = f"{name}, alias {alias}, one address {one}, step {step}"
            np.testing.assert_allclose(found, expected, atol=atol, err_msg=told)
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
