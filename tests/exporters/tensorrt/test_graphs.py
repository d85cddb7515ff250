"""The two graphs, run by ONNX Runtime, do what the exported file does; and TensorRT takes them."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import less_cache as lc
from exporters.common.manifest import MODEL, WEIGHTS, read_manifest
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.onnx.nodes import node_inputs
from exporters.tensorrt import limits
from exporters.tensorrt.graphs import derive_graphs, layers_of
from exporters.tensorrt.operators import OPSET, check_operators, types_of
from tests.exporters.onnx.test_positions import ORIGINAL, RULES, mixture
from tests.exporters.tensorrt.running import session_of
from tests.helpers import POLICIES, policy_id
from tests.integrations.models import build, less, model_of, prompts

C = 8


class Graphs:
    """A step's and a prompt's session, spoken to like an `OnnxDecoder`."""

    def __init__(self, folder, plugin):
        self.manifest = read_manifest(folder)
        self.sessions = [session_of(path) for path in derive_graphs(folder, plugin=plugin)]

    def append(self, state, ids, mask):
        step, prompt = self.sessions
        session = step if ids.shape[1] == 1 else prompt
        given = {f"past.{name}": array for name, array in state.items()}
        # A plugin takes bytes as int8.
        signed = {x.name for x in session.get_inputs() if x.type == "tensor(int8)"}
        given = {n: x.view(np.int8) if n in signed else x for n, x in given.items()}
        tokens = {"input_ids": ids, "attention_mask": mask}
        logits, *arrays = session.run(None, {**tokens, **given})
        arrays = [x.view(np.uint8) if x.dtype == np.int8 else x for x in arrays]
        state.update(zip(state, arrays, strict=True))
        return logits[:, 0]


def compare(folder, plugin, *, atol=1e-5, steps=8, lengths=(2 * C, 3)):
    """Prompts with left padding, steps, a second turn, and a row that takes nothing in."""
    decoder, derived = OnnxDecoder(folder, threads=1), Graphs(folder, plugin)
    state = decoder.new_state(len(lengths))
    other = state.numpy()
    ids, mask = (x.numpy() for x in prompts(list(lengths)))
    for step in range(steps):
        expected = decoder.append(state, ids, mask)
        found = derived.append(other, ids, mask)
        rows = mask.any(1)
        np.testing.assert_allclose(found[rows], expected[rows], atol=atol, rtol=atol)
        chosen = expected.argmax(1)
        np.testing.assert_array_equal(found.argmax(1)[rows], chosen[rows], err_msg=f"step {step}")
        ids = chosen[:, None]
        if step == 3:
            # Different tokens: equal ones have keys of equal norms, whose order rounding decides.
            ids = np.stack([np.arange(5, C + 8), np.arange(40, C + 43)])
        mask = np.ones_like(ids)
        mask[1, -1] = step % 2
    for name, array in state.numpy().items():
        np.testing.assert_allclose(
            other[name].astype(np.float64),
            array.astype(np.float64),
            atol=100 * atol,
            rtol=100 * atol,
            err_msg=name,
        )


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_graphs_of_every_policy_do_what_the_file_does(policy, tmp_path):
    model = build("llama", num_hidden_layers=1)
    capacity = 64 if isinstance(policy, lc.FullCache) else C
    rank = 0 if isinstance(policy, lc.FullCache | lc.KeyNorm) else 4
    kind = "paper" if isinstance(policy, lc.TOVA) else "exp"
    config = lc.CacheConfig.from_model(model.config, capacity=capacity, policy=policy, rank=rank)
    maps = lc.FeatureMaps.initialise(config, kind=kind, hidden=8) if rank else None
    export_decoder(model, config, maps, tmp_path)
    for plugin in (True, False):
        compare(tmp_path, plugin)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_caches_too_large_to_sort_are_ordered_by_counting(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_SORTED", 2 * C - 2)
    model = build("llama", num_hidden_layers=1)
    capacity = 64 if isinstance(policy, lc.FullCache) else C
    rank = 0 if isinstance(policy, lc.FullCache) else 4
    config = lc.CacheConfig.from_model(model.config, capacity=capacity, policy=policy, rank=rank)
    maps = lc.FeatureMaps.initialise(config, hidden=8) if rank else None
    export_decoder(model, config, maps, tmp_path)
    compare(tmp_path, plugin=True)
    _, prompt = derive_graphs(tmp_path)
    ops = {node.op_type for node in onnx.load(prompt, load_external_data=False).graph.node}
    assert "TopK" not in ops


@pytest.mark.parametrize("large", [False, True])
def test_graphs_of_heads_that_differ_do_what_the_file_does(large, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(limits, "MAX_SORTED", 2 * C)
    model = build("llama", num_hidden_layers=1)
    config, maps = less(model, capacity=[[C, C + 3]], policy=lc.ObservationWindow(window=6))
    export_decoder(model, config, maps, tmp_path)
    for plugin in (True, False):
        compare(tmp_path, plugin)
    step, _ = derive_graphs(tmp_path)
    graph = onnx.load(step, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain]
    assert [node.name for node in nodes] == [f"layers.0.h{h}.LessAttention" for h in (0, 1)]
    for node, capacity in zip(nodes, (C, C + 3), strict=True):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["capacity"] == capacity


@pytest.mark.parametrize(("family", "opset"), [("gemma2", 20), ("falcon_mqa", 23)])
def test_graphs_of_other_models_do_what_the_file_does(family, opset, tmp_path):
    # Gemma 2 has soft-capped logits and sliding layers; Falcon has one KV head.
    changes = {}
    if family == "gemma2":
        changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = build(family, **changes)
    policy = lc.Scissorhands(recent=2, window=40)
    config, maps = less(model, capacity=C, policy=policy)
    export_decoder(model, config, maps, tmp_path, opset=opset)
    for plugin in (True, False):
        compare(tmp_path, plugin, atol=1e-4 if family == "gemma2" else 1e-5)
    layers = layers_of(read_manifest(tmp_path))
    assert layers[-1].config == config.layer(config.num_layers - 1)
    windows = [5, 0] if family == "gemma2" else [0, 0]
    assert [layer.window for layer in layers] == windows
    assert [layer.kind for layer in layers] == [None if w else "exp" for w in windows]


def test_graphs_of_half_precision_do_what_the_file_does(tmp_path):
    model = build("llama", num_hidden_layers=1)
    export_decoder(model, *less(model, capacity=C), tmp_path, dtype="float16")
    for plugin in (True, False):
        compare(tmp_path, plugin, atol=3e-2, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = model_of("llama")
    out = tmp_path_factory.mktemp("exported")
    return export_decoder(model, *less(model, capacity=C), out, dtype="bfloat16")


def test_graphs_share_the_weights_and_are_checked_onnx(folder):
    before = (folder / WEIGHTS).read_bytes()
    for plugin in (True, False):
        for path in derive_graphs(folder, plugin=plugin):
            onnx.checker.check_model(str(path), full_check=True)
            proto = onnx.load(path, load_external_data=False)
            assert path.stat().st_size < 300_000
            held = {t.external_data[0].value for t in proto.graph.initializer if t.external_data}
            assert held == {WEIGHTS}
            assert not proto.functions
            assert {(o.domain, o.version) for o in proto.opset_import} <= {
                ("", OPSET),
                ("less_cache", 1),
            }
    assert (folder / WEIGHTS).read_bytes() == before


def test_a_bfloat16_step_is_the_plugins_node_and_fixed_shapes(folder):
    path, _ = derive_graphs(folder)
    graph = onnx.load(path, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain]
    assert [node.op_type for node in nodes] == ["LessAttention"] * 2
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes["plugin_version"] == b"1"
    assert attributes["plugin_namespace"] == b""
    dims = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims["input_ids"] == dims["attention_mask"] == ["batch", 1]
    assert dims["logits"] == ["batch", 1, 97]
    users = {node.op_type for node in graph.node if "attention_mask" in node.input}
    assert "Slice" not in users
    original = onnx.load(folder / MODEL, load_external_data=False).graph
    assert [v.name for v in graph.input] == [v.name for v in original.input]
    assert [v.name for v in graph.output] == [v.name for v in original.output]


def test_no_loop_no_choice_and_no_scan_is_left(folder):
    for plugin in (True, False):
        for path in derive_graphs(folder, plugin=plugin):
            ops = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
            assert not ops & {"Loop", "If", "Scan", "RMSNormalization", "Pad"}


def one_node(op, kinds, *, axes_constant=True, domain=""):
    inputs = [
        onnx.helper.make_tensor_value_info(f"x{i}", kind, ["n"]) for i, kind in enumerate(kinds)
    ]
    node = onnx.helper.make_node(op, [value.name for value in inputs], ["y"], domain=domain)
    output = onnx.helper.make_tensor_value_info("y", kinds[0], None)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, [output]))


F, I32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (one_node("BitwiseAnd", [I64, I64]), "ai.onnx.BitwiseAnd"),
        (one_node("CumSum", [I32, I64]), "CumSum of INT32"),
        (one_node("ReduceSum", [F, I64]), "ReduceSum whose axes are no constant"),
        (one_node("Gelu", [F], domain="com.microsoft"), "com.microsoft.Gelu"),
    ],
)
def test_what_the_parser_does_not_take_is_told(model, message):
    with pytest.raises(ValueError, match=f"does not take.*{message}"):
        check_operators(model)


def sorting(*, count=False):
    """A graph that sorts ``x``, rewritten."""
    from onnxscript import ir

    from exporters.tensorrt.rewrites import rewrite

    x = onnx.helper.make_tensor_value_info("x", F, [1, 1, "n"])
    size = onnx.helper.make_tensor_value_info("size", I64, [1])
    out = onnx.helper.make_tensor_value_info("y", I64, [1, 1, "n"])
    node = onnx.helper.make_node("TopK", ["x", "size"], ["", "y"], axis=2, largest=0)
    graph = onnx.helper.make_graph([node], "g", [x, size], [out])
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10
    )
    model = ir.from_proto(proto)
    rewrite(model, count=count)
    return ir.to_proto(model)


def sorted_by(values):
    """What the rewritten TopK makes of a runtime that turns equals round."""
    # The last of equals first: negated and turned round, ONNX's own order is that.
    proto = sorting()
    first = next(node for node in proto.graph.node if node.op_type == "TopK")
    assert len([node for node in proto.graph.node if node.op_type == "TopK"]) == 2
    renamed = dict(zip(first.output, ("values", "places"), strict=True))
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    proto.graph.node.remove(first)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("values", F, [1, 1, "n"]))
    proto.graph.input.append(onnx.helper.make_tensor_value_info("places", I64, [1, 1, "n"]))
    turned = len(values) - 1 - np.argsort(values[::-1], kind="stable")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}
    given = {
        "x": values,
        "size": np.array([len(values)]),
        "values": values[turned],
        "places": turned,
    }
    shaped = {
        name: array if name == "size" else array[None, None]
        for name, array in given.items()
        if name in names
    }
    return session.run(None, shaped)[0][0, 0]


@pytest.fixture
def equals():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, 300).astype(np.float32)
    values[::7], values[3::11] = np.inf, -np.inf
    return values


def test_the_order_of_equals_does_not_hang_on_the_runtime(equals):
    np.testing.assert_array_equal(sorted_by(equals), np.argsort(equals, kind="stable"))


def test_a_counted_order_is_the_sorted_one(equals):
    proto = sorting(count=True)
    assert all(node.op_type != "TopK" for node in proto.graph.node)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"x": equals[None, None], "size": np.array([len(equals)])}
    names = {node.name for node in session.get_inputs()}
    [found] = session.run(None, {name: given[name] for name in names})
    np.testing.assert_array_equal(found[0, 0], np.argsort(equals, kind="stable"))


def test_positions_past_the_original_length(tmp_path):
    family, changes = RULES["dynamic"]
    model = build(family, **changes)
    config, maps = less(model, capacity=C)
    export_decoder(model, config, maps, tmp_path)
    compare(tmp_path, plugin=False, atol=1e-4, lengths=(ORIGINAL - 2, 3))


def test_mixtures_of_experts(tmp_path):
    model = mixture("olmoe")
    config, maps = less(model, capacity=C)
    export_decoder(model, config, maps, tmp_path)
    compare(tmp_path, plugin=False)


@pytest.mark.parametrize(("name", "count"), [("calibrated", 16), ("by layer", 12)])
def test_graphs_over_codes_do_what_the_file_does(coded, name, count):
    folder = coded(name).folder
    for plugin in (False, True):
        compare(folder, plugin, atol=1e-4, steps=4)
    for path in derive_graphs(folder, plugin=False):
        graph = onnx.load(path, load_external_data=False).graph
        values = (*graph.input, *graph.output)
        bytes_ = onnx.TensorProto.UINT8
        codes = {x.name for x in values if x.type.tensor_type.elem_type == bytes_}
        assert len(codes) == count
        # TensorRT has bytes at an engine's edge alone.
        for node in graph.node:
            assert node.op_type == "Cast" or not codes & {*node.input, *node.output}


@pytest.mark.parametrize("name", ["calibrated", "windows"])
def test_a_step_with_the_plugin_has_codes_as_int8(coded, name):
    folder = coded(name).folder
    manifest = read_manifest(folder)
    step, prompt = (
        onnx.load(path, load_external_data=False).graph for path in derive_graphs(folder)
    )
    kinds, others = types_of(step), types_of(prompt)
    codes = [spec.name for spec in manifest.state if spec.dtype == "uint8"]
    assert codes
    nodes = {value: node for node in step.node for value in (*node.input, *node.output)}
    for array in codes:
        for side in ("past", "present"):
            assert kinds[f"{side}.{array}"] == "INT8"
            assert others[f"{side}.{array}"] == "UINT8"
            # Nothing but the plugin touches them.
            assert nodes[f"{side}.{array}"].op_type == "LessAttention"
    for node in step.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "transform" in attributes:
            assert attributes["model_dtype"].decode() == manifest.config.dtype
            assert kinds[node.input[0]] == "FP32"


def test_narrow_maps_over_codes_come_in_the_models_dtype(tmp_path):
    model = build("llama", num_hidden_layers=1)
    config, maps = less(model, capacity=C)
    config = config.replace(quantization=lc.Quantization(4, 4, "hadamard"))
    export_decoder(model, config, maps, tmp_path, dtype="float16")
    step, _ = derive_graphs(tmp_path)
    graph = onnx.load(step, load_external_data=False).graph
    (node,) = (node for node in graph.node if node.op_type == "LessAttention")
    names = node_inputs(config.layer(0), "exp")
    kinds = types_of(graph)
    for name in ("phi_w1", "phi_w2", "psi_w1", "psi_w2"):
        assert kinds[node.input[names.index(name)]] == "FP16"
    for name in ("q", "psi_b", "H"):
        assert kinds[node.input[names.index(name)]] == "FP32"
    # From one state: a pair at the edge of two codes would make two of them.
    decoder, derived = OnnxDecoder(tmp_path, threads=1), Graphs(tmp_path, plugin=True)
    state = decoder.new_state(2)
    ids, mask = (x.numpy() for x in prompts([2 * C, 3]))
    decoder.append(state, ids, mask)
    other, token = state.numpy(), np.array([[7], [30]])
    expected = decoder.append(state, token)
    found = derived.append(other, token, np.ones_like(token))
    np.testing.assert_allclose(found, expected, atol=3e-2)
    np.testing.assert_allclose(other["0.z"], state.numpy()["0.z"], rtol=2e-2)
