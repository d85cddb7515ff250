"""Exported models know their positions, past the length that the rule was made for, too."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import less_cache as lc
from exporters.onnx import OnnxDecoder, export_decoder
from tests.exporters.exported import CAPACITY, TorchSide, attached, compare
from tests.integrations.models import COMMON, GQA, build, less

ORIGINAL = 32
BASE = {"rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": ORIGINAL,
    **BASE,
}
SCALED = {"factor": 4.0, **BASE}
DYNAMIC = {"rope_type": "dynamic", **SCALED}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    **SCALED,
}
RULES = {
    # Phi-3 has the length outside its rule, too, and takes that one.
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", **SCALED}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "original_max_position_embeddings": ORIGINAL,
                **SCALED,
            }
        },
    ),
    # Two rules in one model, as in Gemma 3, and one that changes.
    "by-layer": (
        "gemma3",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", **BASE},
            },
        },
    ),
}
EXPERTS = {
    **GQA,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def mixture(kind, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**COMMON, **EXPERTS, "sliding_window": None, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("rule", RULES)
def test_logits_past_the_original_length_are_torchs(rule, tmp_path):
    family, changes = RULES[rule]
    model = build(family, **changes)
    tensors = {name: x.clone() for name, x in model.named_buffers()}
    config, maps = less(model, capacity=CAPACITY)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path), threads=1)
    for name, x in model.named_buffers():
        torch.testing.assert_close(x, tensors[name], msg=name)
    with attached(model, config, maps) as handle:
        # Rows that begin past it, one that gets there while decoding, and one that never does.
        for lengths in ([ORIGINAL - 5], [2, ORIGINAL - 1, ORIGINAL], [3 * ORIGINAL, 3]):
            # transformers' dynamic rule remembers a longer text until it sees a short one.
            model(torch.ones(1, 2, dtype=torch.long), use_cache=False)
            worst = compare(decoder, TorchSide(model, handle), lengths, 10)
            assert worst < 1e-4, lengths


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_mixtures_of_experts(kind, tmp_path):
    model = mixture(kind)
    before = model.get_experts_implementation()
    config, maps = less(model, capacity=CAPACITY)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path), threads=1)
    assert model.get_experts_implementation() == before
    with attached(model, config, maps) as handle:
        assert compare(decoder, TorchSide(model, handle), [20, 5], 8) < 1e-4


def test_positions_of_a_kind_of_their_own_are_refused_by_name(tmp_path):
    rule = {**LONG, "short_mscale": 1.1, "long_mscale": 1.3, "factor": 4.0}
    model = mixture("phimoe", rope_parameters=rule)
    config, maps = less(model, capacity=CAPACITY)
    with pytest.raises(ValueError, match=r"^model: phimoe cannot be exported") as caught:
        export_decoder(model, config, maps, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert "forward" not in vars(model.model.rotary_emb)


def test_a_module_that_does_not_follow_transformers_rules_is_refused(tmp_path):
    model = build("llama", rope_parameters=DYNAMIC)

    class Rotary(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids)

    model.model.rotary_emb.__class__ = Rotary
    config, maps = less(model, capacity=CAPACITY)
    with pytest.raises(ValueError, match="model: llama cannot be exported: its Rotary computes"):
        export_decoder(model, config, maps, tmp_path / "out")


def test_models_without_full_attention_are_refused_by_name():
    kinds = ["chunked_attention"] * 2
    model_config = CONFIG_MAPPING["llama4_text"](num_hidden_layers=2, layer_types=kinds)
    with pytest.raises(ValueError, match=r"no layer attends over everything.* chunked_attention"):
        lc.CacheConfig.from_model(model_config, capacity=4, policy=lc.TOVA())
