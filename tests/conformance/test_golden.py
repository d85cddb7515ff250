"""Each backend reproduces what the official LESS code computes; see golden/README.md."""

from pathlib import Path

import numpy as np
import pytest

import less_cache as lc
from tests.conformance.cases import Runner, each_case
from tests.helpers import assert_close

GOLDEN = Path(__file__).parent / "golden"
MAPS = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2")


@each_case(lambda case: case.wide and "paper" in case.kinds)
@pytest.mark.parametrize("name", ["h2o_mha", "h2o_mqa", "lambda_mha"])
def test_official_traces_are_reproduced(case, name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        trace = dict(file)
    q, k, v = (trace[array][None].astype(np.float64) for array in "qkv")
    heavy, recent, prompt = (int(trace[name]) for name in ("heavy", "recent", "prompt_len"))
    if str(trace["policy"]) == "h2o":
        policy = lc.H2O(recent=recent)
    else:
        policy = lc.SinkWindow(sinks=heavy, recent=recent)
    config = lc.CacheConfig(
        num_layers=1,
        query_heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        capacity=heavy + recent + 1,
        policy=policy,
        rank=trace["z"].shape[2],
        dtype=case.dtype,
    )
    maps = lc.FeatureMaps.from_tensors([{name: trace[name] for name in MAPS}])
    runner = Runner(case, config, maps, 1)

    out = runner.attend(*(array[:, :, :prompt] for array in (q, k, v)))
    assert_close(out[0], trace["prompt_out"], 1e-5, "prompt")

    steps = min(trace["out"].shape[0], 12 if case.interpreted else 1000)
    for step in range(steps):
        token = slice(prompt + step, prompt + step + 1)
        out = runner.attend(*(array[:, :, token] for array in (q, k, v)))
        assert_close(out[0, :, 0], trace["out"][step], 1e-5, f"out of step {step}")
        held = runner.held()
        for head, wanted in enumerate(trace["kept"][step]):
            positions = held.positions[0, head]
            np.testing.assert_array_equal(positions[positions >= 0], np.nonzero(wanted)[0])
        if step > 0:
            # The official code evicts after a step, `attend` before the next one.
            # The trace's own sums are float32: two orders of the same sum differ by some units.
            assert_close(held.H[0], trace["H"][step - 1], 2e-5, f"H of step {step}")
            assert_close(held.z[0], trace["z"][step - 1], 2e-5, f"z of step {step}")
    assert steps > 10
