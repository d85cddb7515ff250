"""onnxruntime-genai loads the packed form and generates what torch does."""

import json

import numpy as np
import pytest
import torch

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.onnx.export import GENAI_CONFIG
from exporters.onnx.genai import export_genai
from tests.exporters.exported import TorchSide, attached
from tests.integrations.models import less, model_of, prompts

genai = pytest.importorskip("onnxruntime_genai")
EOS = 2


def generator_of(loaded, ids):
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=100, batch_size=len(ids), do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    return generator


@pytest.mark.parametrize(
    "policy", [lc.H2O(recent=2), lc.Scissorhands(recent=2, window=40)], ids=["H2O", "Scissorhands"]
)
def test_prompts_steps_batches_padding_and_a_second_turn(policy, tmp_path):
    model = model_of("llama")
    config, maps = less(model, capacity=8, policy=policy)
    export_genai(model, config, maps, tmp_path)
    loaded = genai.Model(str(tmp_path))
    with attached(model, config, maps) as handle:
        for lengths in ([9], [1], [12, 5, 1]):
            ids, mask = prompts(lengths)
            generator, side = generator_of(loaded, ids), TorchSide(model, handle)
            ended = np.zeros(len(lengths), bool)
            for step in range(24):
                expected = side.append(ids, mask)
                found = generator.get_logits().reshape(expected.shape)
                assert np.abs(found - expected)[~ended].max() < 1e-4, (lengths, step)
                if step == 11 and len(lengths) == 1:
                    # The library never runs the last token it chose: a turn begins with it.
                    generator.generate_next_token()
                    ids = torch.tensor([[int(generator.get_next_tokens()[0]), 5, 6, 7]])
                    generator.append_tokens(ids.numpy().astype(np.int32))
                else:
                    generator.generate_next_token()
                    tokens = np.array(generator.get_next_tokens())
                    ended |= expected.argmax(1) == EOS
                    np.testing.assert_array_equal(tokens[~ended], expected.argmax(1)[~ended])
                    if ended.all():
                        break
                    ids = torch.from_numpy(tokens).long()[:, None]
                mask = torch.ones_like(ids)


def test_heads_that_differ(tmp_path):
    model = model_of("llama_mha")
    config, maps = less(model, capacity=[[8, 8, 11, 8], 9], policy=lc.Scissorhands(window=40))
    export_genai(model, config, maps, tmp_path)
    loaded = genai.Model(str(tmp_path))
    with attached(model, config, maps) as handle:
        ids, mask = prompts([12, 5])
        generator, side = generator_of(loaded, ids), TorchSide(model, handle)
        for step in range(12):
            expected = side.append(ids, mask)
            found = generator.get_logits().reshape(expected.shape)
            assert np.abs(found - expected).max() < 1e-4, step
            assert EOS not in expected.argmax(1)
            generator.generate_next_token()
            ids = torch.from_numpy(np.array(generator.get_next_tokens())).long()[:, None]
            mask = torch.ones_like(ids)


def test_the_folder_says_what_the_library_asks(tmp_path):
    model = model_of("gemma2")
    config, maps = less(model)
    export_genai(model, config, maps, tmp_path)
    told = json.loads((tmp_path / GENAI_CONFIG).read_text())["model"]
    assert told["decoder"]["num_hidden_layers"] == model.config.num_hidden_layers
    assert told["vocab_size"] == 97
    loaded = genai.Model(str(tmp_path))
    with attached(model, config, maps) as handle:
        ids, mask = prompts([11])
        expected = TorchSide(model, handle).append(ids, mask)
    found = generator_of(loaded, ids).get_logits().reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_layers_of_other_ranks_and_bits(tmp_path):
    model = model_of("llama")
    config, maps = less(model, capacity=[8, [7, 11]], rank=[0, 4])
    config = config.replace(quantization=[lc.Quantization(4, 3), lc.Quantization(8, 2)])
    export_genai(model, config, maps, tmp_path / "genai")
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path / "onnx"), threads=1)
    loaded = genai.Model(str(tmp_path / "genai"))
    ids, mask = (x.numpy() for x in prompts([14, 14]))
    generator, state = generator_of(loaded, torch.from_numpy(ids)), decoder.new_state(2)
    for step in range(12):
        expected = decoder.append(state, ids, mask)
        found = generator.get_logits().reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(step))
        generator.generate_next_token()
        ids = np.array(generator.get_next_tokens()).astype(np.int64)[:, None]
        mask = np.ones_like(ids)
    some = config.replace(quantization=[lc.Quantization(4, 3), None])
    with pytest.raises(ValueError, match="config: quantization is None in layer 1, but not in all"):
        export_genai(model, some, maps, tmp_path / "out")


def test_codes_travel_bit_by_bit(coded, tmp_path):
    parts = coded("calibrated")
    export_genai(parts.model, parts.config, parts.maps, tmp_path, transforms=parts.transforms)
    # The same graph, its state not packed: what it gives, the packed one must give.
    loaded, decoder = genai.Model(str(tmp_path)), parts.decoder
    ids, mask = (x.numpy() for x in prompts([14, 14]))
    generator, state = generator_of(loaded, torch.from_numpy(ids)), decoder.new_state(2)
    for step in range(30):
        expected = decoder.append(state, ids, mask)
        found = generator.get_logits().reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(step))
        assert EOS not in expected.argmax(1)
        generator.generate_next_token()
        ids = np.array(generator.get_next_tokens()).astype(np.int64)[:, None]
        mask = np.ones_like(ids)


def test_codes_beside_layers_that_have_none_are_refused(tmp_path):
    model = model_of("gemma2")
    config, maps = less(model)
    config = config.replace(quantization=lc.Quantization(4, 4))
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        export_genai(model, config, maps, tmp_path / "out")
    assert not (tmp_path / "out").exists()
