"""OpenVINO against ONNX Runtime: inlined files, over hundreds of steps in which pairs leave."""

import numpy as np
import pytest

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from tests.integrations.models import build, less

ov = pytest.importorskip("openvino", reason="openvino is not installed; the extra of that name")

STEPS, BATCH = 500, 2
ONE = {"num_hidden_layers": 1}
# Equal tokens have keys whose norms are equal but for rounding, so that KeyNorm's choice among them
# is anybody's: it is left out.
CASES = {
    "h2o": ("llama", {"capacity": 20, "policy": lc.H2O()}, {}),
    "heads": ("llama_mha", {"capacity": [[16, 16, 30, 20], 20], "policy": lc.DecayedH2O()}, {}),
    "windows": ("gemma2", {"capacity": 20, "policy": lc.SinkWindow()}, {}),
    "paper's maps": ("llama", {"capacity": 20, "policy": lc.TOVA(), "kind": "paper"}, ONE),
    "history": ("qwen3", {"capacity": 20, "policy": lc.Scissorhands(window=22)}, ONE),
    "observed": ("llama", {"capacity": 20, "policy": lc.ObservationWindow(window=6)}, ONE),
}


class Runtime:
    """An inlined file in OpenVINO."""

    def __init__(self, folder):
        exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        model = ov.Core().compile_model(folder / "model.onnx", "CPU", exact)
        self.request = model.create_infer_request()

    def run(self, state, ids, mask):
        """Logits and the new state."""
        past = {f"past.{name}": array for name, array in state.items()}
        self.request.infer({"input_ids": ids, "attention_mask": mask, **past})
        given = {name: self.request.get_tensor(f"present.{name}").data.copy() for name in state}
        return self.request.get_tensor("logits").data[:, 0].copy(), given


def turns():
    """Tokens and masks: a prompt, steps, now and then a chunk with padding."""
    generator = np.random.default_rng(0)
    for step in range(STEPS):
        width = 9 if step % 50 == 0 else 1
        mask = np.ones((BATCH, width), np.int64)
        if width > 1 and step:
            mask[1, :3] = 0
        yield generator.integers(3, 97, (BATCH, width)), mask


def exported(folder, family, cache, changes):
    model = build(family, **changes)
    config, maps = less(model, **cache)
    export_decoder(model, config, maps, folder, inline=True)
    return OnnxDecoder(folder, threads=1), Runtime(folder)


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits_and_pairs(name, tmp_path):
    decoder, runtime = exported(tmp_path, *CASES[name])
    state = decoder.new_state(BATCH)
    other = state.numpy()
    for step, (ids, mask) in enumerate(turns()):
        expected = decoder.append(state, ids, mask)
        found, other = runtime.run(other, ids, mask)
        np.testing.assert_allclose(found, expected, atol=5e-4, err_msg=f"step {step}")
        held = state.numpy()
        for key in (key for key in held if key.endswith("positions")):
            np.testing.assert_array_equal(other[key], held[key], err_msg=f"{key}, step {step}")
