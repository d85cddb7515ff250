"""A model above the 2 GB that one protobuf may have; only where LESS_CACHE_LARGE_TESTS is set."""

import os

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import less_cache as lc
from exporters.common.manifest import MODEL, WEIGHTS
from exporters.onnx import OnnxDecoder, export_decoder
from tests.exporters.exported import TorchSide, attached


@pytest.mark.skipif(
    not os.environ.get("LESS_CACHE_LARGE_TESTS"), reason="needs 10 GB of memory and disk"
)
def test_a_model_above_two_gigabytes(tmp_path):
    config = LlamaConfig(
        vocab_size=140_000,
        hidden_size=4096,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb.__init__(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif "embed" in name:
                parameter.zero_()
                parameter[:200].normal_(generator=generator)
            else:
                parameter.normal_(std=0.02, generator=generator)
    cache = lc.CacheConfig.from_model(model.config, capacity=8, policy=lc.H2O(), rank=4)
    maps = lc.FeatureMaps.initialise(cache, hidden=8)
    export_decoder(model, cache, maps, tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size > 2**31
    assert (tmp_path / MODEL).stat().st_size < 2**20
    onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
    decoder = OnnxDecoder(tmp_path, threads=1, optimize=False)
    ids = torch.randint(3, 200, (1, 20), generator=generator)
    state = decoder.new_state(1)
    with attached(model, cache, maps) as handle:
        side = TorchSide(model, handle)
        for part in (ids[:, :18], ids[:, 18:19], ids[:, 19:]):
            found = decoder.append(state, part.numpy())
            expected = side.append(part, torch.ones_like(part))
            assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
