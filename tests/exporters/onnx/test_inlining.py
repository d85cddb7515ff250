"""Files without functions: what they compute, and what is refused."""

import numpy as np
import onnx
import pytest

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.tensorrt import derive_graphs
from tests.exporters.exported import fitted
from tests.integrations.models import build, less, prompts

CASES = {
    "heads": ("llama_mha", {"capacity": [[6, 6, 9, 7]], "policy": lc.H2O(recent=2)}, {}),
    "codes": ("llama", {"capacity": 8}, {"quantization": lc.Quantization(3, 4, "calibrated")}),
    "history": ("llama", {"capacity": 8, "policy": lc.Scissorhands(recent=2, window=9)}, {}),
}


def parts_of(name):
    """A model of one layer, config, maps and transforms."""
    family, cache, changes = CASES[name]
    model = build(family, num_hidden_layers=1)
    config, maps = less(model, **cache)
    config = config.replace(**changes)
    return model, config, maps, fitted(config) if changes else None


@pytest.fixture(scope="module", params=[*CASES])
def folders(request, tmp_path_factory):
    """One model as it is, and inlined."""
    model, config, maps, transforms = parts_of(request.param)
    folder = tmp_path_factory.mktemp("inlined")
    for inline in (False, True):
        export_decoder(
            model, config, maps, folder / str(inline), inline=inline, transforms=transforms
        )
    return folder / "False", folder / "True"


def operators(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from operators(attribute.g)


def test_the_file_has_standard_operators_alone(folders):
    for folder, expected in zip(folders, ({"", "less_cache"}, {""}), strict=True):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        assert {node.domain for node in operators(model.graph)} == expected
        assert {entry.domain for entry in model.opset_import} == expected
        assert bool(model.functions) == ("less_cache" in expected)


def test_the_same_logits_and_states_as_with_functions(folders):
    ids, mask = (x.numpy() for x in prompts([11, 5]))
    decoders = [OnnxDecoder(folder, threads=1) for folder in folders]
    states = [decoder.new_state(2) for decoder in decoders]
    for step in range(30):
        first, second = (d.append(s, ids, mask) for d, s in zip(decoders, states, strict=True))
        np.testing.assert_allclose(second, first, atol=2e-5)
        # A chunk on the way.
        ids = first.argmax(1)[:, None].repeat(4 if step == 15 else 1, 1)
        mask = np.ones_like(ids)
    first, second = (state.numpy() for state in states)
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, atol=2e-5, err_msg=name)


def test_a_long_history_is_refused(tmp_path):
    model = build("llama", num_hidden_layers=1)
    config, maps = less(model, capacity=8, policy=lc.Scissorhands(recent=2, window=23))
    with pytest.raises(ValueError, match=r"inline: layer 0 has Scissorhands.* window of 22"):
        export_decoder(model, config, maps, tmp_path / "out", inline=True)
    assert not (tmp_path / "out").exists()


def test_no_engines_are_built_from_it(folders):
    with pytest.raises(ValueError, match="inline=True"):
        derive_graphs(folders[1], plugin=False)
