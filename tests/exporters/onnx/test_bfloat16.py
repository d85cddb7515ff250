"""bfloat16 files, which TensorRT is given and ONNX Runtime cannot run."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

import less_cache as lc
from exporters.common.manifest import MODEL, read_manifest
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.onnx.genai import export_genai
from tests.exporters.exported import TorchSide, attached
from tests.integrations.models import build, less, model_of, prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = model_of("llama")
    out = tmp_path_factory.mktemp("bfloat16")
    return export_decoder(model, *less(model, capacity=8), out, dtype="bfloat16")


def widened(path):
    """The file with float32 in the place of bfloat16, its numbers as they were."""
    model = onnx.load(path)

    def widen_tensor(tensor):
        if tensor.data_type == TensorProto.BFLOAT16:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    def widen(nodes):
        for node in nodes:
            for attribute in node.attribute:
                widen_graph(attribute.g)
                if attribute.HasField("t"):
                    widen_tensor(attribute.t)
                if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT

    def widen_graph(graph):
        widen(graph.node)
        for tensor in graph.initializer:
            widen_tensor(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT

    widen_graph(model.graph)
    for body in model.functions:
        widen(body.node)
    return model


def test_a_file_in_float32_is_the_model_whose_weights_were_rounded(folder, tmp_path):
    # Rounding between operators aside, this is all of what the file computes.
    rounded = build("llama")
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    config, maps = less(rounded, capacity=8)
    maps = lc.FeatureMaps(
        [layer.to(dtype=torch.bfloat16).to(dtype=torch.float32) for layer in maps]
    )
    session = ort.InferenceSession(
        widened(folder / MODEL).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    ids, mask = prompts([11, 4])
    state = {
        spec.name: np.full(
            (2, *spec.shape),
            -1 if spec.name.endswith("positions") else 0,
            "float32" if spec.dtype == "bfloat16" else spec.dtype,
        )
        for spec in read_manifest(folder).state
    }
    with attached(rounded, config, maps) as handle:
        side = TorchSide(rounded, handle)
        for _ in range(6):
            given = {f"past.{name}": array for name, array in state.items()}
            given |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            logits, *arrays = session.run(None, given)
            state = dict(zip(state, arrays, strict=True))
            np.testing.assert_allclose(logits[:, 0], side.append(ids, mask), atol=1e-4)
            ids = torch.from_numpy(logits[:, 0].argmax(1))[:, None]
            mask = torch.ones_like(ids)


def test_the_graph_is_of_bfloat16(folder):
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)
    }
    for name in ("past.0.keys", "present.1.values", "logits"):
        assert kinds[name] == TensorProto.BFLOAT16
    for name in ("past.0.scores", "present.0.H"):
        assert kinds[name] == TensorProto.FLOAT
    assert read_manifest(folder).config.dtype == "bfloat16"


def test_onnx_runtime_is_not_asked_to_run_it(folder):
    with pytest.raises(ValueError, match="a bfloat16 model, which ONNX Runtime cannot run"):
        OnnxDecoder(folder)


def test_genai_refuses_it(tmp_path):
    model = model_of("llama")
    with pytest.raises(ValueError, match="dtype: got 'bfloat16'"):
        export_genai(model, *less(model), tmp_path, dtype="bfloat16")
