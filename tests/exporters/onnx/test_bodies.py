"""The operators' bodies do what the float64 oracle does."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from onnxscript import ir

import less_cache as lc
from exporters.onnx import nodes
from exporters.onnx.building import Builder
from exporters.onnx.parts import Layer, popcount
from tests.conformance.cases import ALL_POLICIES, ORACLE, BackendCase, Runner
from tests.conformance.scenarios import CloseCall, Scenario, scenarios
from tests.conformance.test_far_positions import PREFIX, STARTS, TOKENS, move
from tests.exporters.onnx.single_layer import OnnxLayers, session_of, single_node_model
from tests.helpers import (
    POLICIES,
    assert_close,
    assert_same_state,
    policy_id,
    random_inputs,
    random_maps,
    small_config,
)

CASE = BackendCase("onnx-float32", "onnx", "float32", 2e-5, 5e-5)


def follow(scenario, **options):
    maps = scenario.maps(CASE)
    runner = OnnxLayers(scenario.config, maps, scenario.batch, **options)
    oracle = Runner(ORACLE, scenario.config, maps, scenario.batch)
    close = CloseCall()
    for layer, arrays, mask in scenario.appends(CASE):
        with close.watch():
            expected = oracle.attend(*arrays, mask, layer=layer)
        if close.met:
            return
        assert_close(runner.attend(*arrays, mask, layer=layer), expected, CASE.outputs, "out")
        assert_same_state(runner.held(layer), oracle.held(layer), CASE.state)


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_outputs_and_states_are_the_oracles(policy):
    @settings(max_examples=25)
    @given(scenarios(CASE, (policy,)))
    def check(scenario):
        follow(scenario)

    check()


@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("policy", POLICIES[1:], ids=policy_id)
def test_a_long_run_of_steps_after_a_prompt_follows_the_oracle(policy, kind):
    config = lc.CacheConfig(1, 4, 2, 4, [[7, 9]], policy, rank=2)
    chunks = ((9, "left"), *((1, "none"),) * 12, (5, "right"), *((1, "holes"),) * 6)
    follow(Scenario(config, kind, batch=2, chunks=chunks, seed=3), opset=23, overload="other")


@pytest.mark.parametrize(
    "policy",
    [lc.DecayedH2O(factor=0.9), lc.ObservationWindow(window=5, neighbours=3)],
    ids=policy_id,
)
def test_a_prompt_of_several_blocks_is_the_prompt_of_one(policy, monkeypatch):
    config = small_config(capacity=9, policy=policy)
    scenario = Scenario(config, "exp", batch=2, chunks=((23, "left"), (17, "holes")), seed=5)
    # Three rows at a time, and two, for the second block has more columns.
    monkeypatch.setattr("exporters.onnx.blocks.BLOCK_ELEMENTS", 3 * 2 * 4 * 30)
    follow(scenario)


def test_a_sliding_layer_sees_its_window_and_no_more():
    config = lc.CacheConfig(1, 4, 2, 4, 5, lc.SinkWindow(sinks=0), rank=0)
    rng = np.random.default_rng(0)
    q, k, v = random_inputs(config, 2, 23, rng)
    layers = OnnxLayers(config, None, 2, window=5)
    parts = [(0, 7), (7, 8), (8, 9), (9, 20), (20, 23)]
    found = [layers.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in parts]
    keys, values = (np.repeat(x, 2, axis=1) for x in (k, v))
    logits = q @ keys.transpose(0, 1, 3, 2) / 2
    distance = np.arange(23)[:, None] - np.arange(23)
    logits = np.where((distance >= 0) & (distance < 5), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values
    assert_close(np.concatenate(found, 2), expected, 2e-5, "out")


@pytest.mark.parametrize("kind", ["paper", "exp"])
def test_sixteen_bits_are_within_their_bound(kind):
    config = small_config(num_layers=1, policy=lc.SinkWindow(sinks=1), dtype="float16")
    case = BackendCase("onnx-float16", "onnx", "float16", 1e-2, 1e-2)
    maps = case.rounded_maps(random_maps(config, kind))
    half = lc.FeatureMaps([layer.to(dtype=torch.float16) for layer in maps])
    runner = OnnxLayers(config, half, 2)
    oracle = Runner(ORACLE, config, maps, 2)
    rng = np.random.default_rng(1)
    for tokens in (9, 1, 1, 4, 1):
        arrays = [case.rounded(x) for x in random_inputs(config, 2, tokens, rng)]
        expected = oracle.attend(*arrays)
        assert_close(runner.attend(*arrays), expected, case.outputs, "out")
        assert_same_state(runner.held(), oracle.held(), case.state)


@pytest.mark.parametrize("window", [5, 8, 40, 62])
def test_all_bits_of_a_history_are_counted(window):
    config = small_config(policy=lc.Scissorhands(window=window), rank=0)
    bits = ir.val("bits", ir.DataType.INT64, ir.Shape([100]))
    graph = ir.Graph([bits], [], nodes=[], opset_imports={"": 20}, name="count")
    count = popcount(Builder(graph, "n"), Layer(config.layer(0), None), bits)
    count.type, count.shape = ir.TensorType(ir.DataType.FLOAT), bits.shape
    graph.outputs.append(count)
    session = session_of(ir.to_proto(ir.Model(graph, ir_version=10)))
    numbers = np.random.default_rng(0).integers(0, 2**window, 100)
    numbers[:2] = 0, 2**window - 1
    expected = [int(number).bit_count() for number in numbers]
    np.testing.assert_array_equal(session.run(None, {"bits": numbers})[0], expected)


def test_nodes_carry_what_a_plugin_needs():
    config = small_config(policy=lc.DecayedH2O(factor=0.5, recent=2), softcap=3.0)
    maps = {n: t.numpy() for n, t in random_maps(config, "paper")[0].tensors.items()}
    model = single_node_model(config.layer(0), "paper", nodes.STEP, maps)
    found = {a.name: onnx.helper.get_attribute_value(a) for a in model.graph.node[0].attribute}
    assert found["plugin_version"] == b"1"
    assert found["plugin_namespace"] == b""
    assert {
        name: found[name]
        for name in ("start", "gain", "recent", "sinks", "capacity", "rank", "decay")
    } == {
        "start": 0,
        "gain": 1,
        "recent": 2,
        "sinks": 0,
        "capacity": 6,
        "rank": 2,
        "decay": 0.5,
    }
    assert found["maps"] == b"paper"
    assert found["softcap"] == 3.0
    assert not {node.domain for node in model.functions[0].node} - {""}


def dense(state, layer):
    """A layer's arrays as nodes take them, where all heads have the same capacity."""
    return {**state.of_run(layer.runs[0]).named(), "length": state.length}


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_step_may_write_over_what_it_read(policy):
    config = small_config(num_layers=1, policy=policy, capacity=12)
    layer = config.layer(0)
    maps = random_maps(config)
    tensors = {n: t.numpy() for n, t in maps[0].tensors.items()}
    model = single_node_model(config.layer(0), "exp", nodes.STEP, tensors)
    rng = np.random.default_rng(0)
    prompt = random_inputs(config, 2, 10, rng)
    steps = [random_inputs(config, 2, 1, rng) for _ in range(6)]
    apart = OnnxLayers(config, maps, 2)
    apart.attend(*prompt)
    state = apart.states[0]
    for optimize in (True, False):
        session = session_of(model, optimize=optimize)
        held = OnnxLayers(config, maps, 2)
        held.attend(*prompt)
        arrays = {name: x.copy() for name, x in dense(held.states[0], layer).items()}
        outs = []
        for step in steps:
            binding = session.io_binding()
            q, k, v = (np.ascontiguousarray(x, np.float32) for x in step)
            out = np.full_like(q, np.nan)
            mask = np.array([[1], [len(outs) % 2]], np.int32)
            given = {"q": q, "k": k, "v": v, "mask": mask, **tensors}
            for name, x in {**given, **arrays}.items():
                binding.bind_input(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
            for name in nodes.node_outputs(config.layer(0)):
                x = out if name == "out" else arrays[name]
                binding.bind_output(f"present_{name}", "cpu", 0, x.dtype, x.shape, x.ctypes.data)
            session.run_with_iobinding(binding)
            arrays["length"] = arrays["length"] + mask[:, 0]
            outs.append(out)
        if optimize:
            expected = [
                apart.attend(*step, np.array([[1], [i % 2]])) for i, step in enumerate(steps)
            ]
            state = apart.states[0]
        for out, wanted in zip(outs, expected, strict=True):
            assert_close(out, wanted, 1e-6, "out")
        for name, array in dense(state, layer).items():
            np.testing.assert_allclose(arrays[name], array, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("start", STARTS)
def test_a_sequence_goes_on_as_it_would_near_its_start(start):
    config = lc.CacheConfig(1, 4, 2, 4, 6, lc.SinkWindow(sinks=1, recent=2), rank=0)
    near, far = OnnxLayers(config, None, 2), OnnxLayers(config, None, 2)
    rng = np.random.default_rng(0)
    prefix = random_inputs(config, 2, PREFIX, rng)
    for layers in (near, far):
        layers.attend(*prefix)
    move(far.states[0], config.policy, start)
    for count in TOKENS:
        inputs = random_inputs(config, 2, count, rng)
        np.testing.assert_array_equal(far.attend(*inputs), near.attend(*inputs))
        expected = near.states[0].positions.astype(np.int64)
        expected[expected >= 1] += start
        np.testing.assert_array_equal(np.sort(far.states[0].positions), np.sort(expected))
