"""Each family of models that the plugin is said to serve, tiny and random."""

from __future__ import annotations

import pytest
import torch

import less_cache as lc
from tests.integrations.models import build
from tests.integrations.vllm.engines import answers, engine, expected

pytest.importorskip("vllm", reason="needs vLLM: make vllm sets up an environment with it")

SHAPES = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "vocab_size": 128,
}
SLIDING = {"num_hidden_layers": 4, "sliding_window": 32, "query_pre_attn_scalar": 24}

FAMILIES = {
    "llama": SHAPES,
    "mistral": SHAPES,
    "qwen2": {**SHAPES, "head_dim": 16},
    "qwen3": SHAPES,
    "phi3": {**SHAPES, "head_dim": 16},
    "gemma2": {**SHAPES, **SLIDING},
    "gemma3": {**SHAPES, **SLIDING},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    model = build(family, **FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    config = lc.CacheConfig.from_model(model.config, capacity=24, policy=lc.H2O(), rank=4)
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    maps.save_pretrained(tmp_path / "maps")
    less = {"capacity": 24, "policy": "h2o", "maps": str(tmp_path / "maps"), "prompt_chunk": 32}
    draws = torch.Generator().manual_seed(1)
    lengths = (1, 20, 33, 100, 180)
    prompts = [torch.randint(3, 97, (n,), generator=draws).tolist() for n in lengths]
    changes = {"model": str(tmp_path / "model"), "skip_tokenizer_init": True, "max_model_len": 256}
    with engine(less, max_num_seqs=4, **changes) as llm:
        found = answers(llm, prompts, 12)
    assert found == expected(prompts, 12, chunk=32, less=less, model=model)
