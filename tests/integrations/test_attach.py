"""Attaching and detaching: what it refuses, and that it leaves no trace."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import less_cache as lc
from less_cache.integrations.transformers import attachment
from tests.integrations.models import COMMON, FAMILIES, GQA, build, full, less, model_of, prompts


def traces(model):
    """Everything that attaching might leave on a model."""
    return {
        "attention": model.config._attn_implementation,
        "own": sorted(name for name in vars(model) if name == "generate"),
        "forwards": sum("forward" in vars(module) for module in model.modules()),
        "hooks": sum(
            len(module._forward_pre_hooks) + len(module._forward_hooks)
            for module in model.modules()
        ),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_detaching_restores_the_model(family):
    model = build(family)
    ids, mask = prompts([7, 4])
    before, tokens = traces(model), model.generate(ids, attention_mask=mask, max_new_tokens=5)
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        assert handle.attached
        assert traces(model) != before
        model.generate(ids, attention_mask=mask, max_new_tokens=5)
    assert not handle.attached
    assert traces(model) == before
    handle.detach()
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5), tokens)
    handle = lc.attach(model, config, maps)
    handle.detach()
    assert traces(model) == before


def test_detaching_after_an_error():
    model = build("llama")
    before = traces(model)
    with pytest.raises(KeyError), lc.attach(model, full(model)):
        raise KeyError
    assert traces(model) == before
    with lc.attach(model, full(model, capacity=3)), pytest.raises(ValueError, match="capacity = 3"):
        model.generate(prompts([7])[0], max_new_tokens=5)
    assert traces(model) == before


def test_an_error_while_attaching_leaves_no_trace(monkeypatch):
    model = build("llama")
    before = traces(model)

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(attachment, "wrap_generate", broken)
    with pytest.raises(RuntimeError, match="no"):
        lc.attach(model, full(model))
    assert traces(model) == before
    monkeypatch.undo()
    lc.attach(model, full(model)).detach()


def test_twice_is_refused():
    model = build("llama")
    with lc.attach(model, full(model)):
        inside = traces(model)
        for other in (model, model.model):
            with pytest.raises(ValueError, match="already attached"):
                lc.attach(other, full(model))
        assert traces(model) == inside
        sibling = type(model)(model.config)
        with pytest.raises(ValueError, match="configuration object"):
            lc.attach(sibling, full(sibling))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_model_of_the_same_configuration_is_left_alone(attention):
    model = build("gemma3", attention=attention)
    sibling = type(model)(model.config).eval()
    ids, mask = prompts([9, 5])
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = sibling.generate(ids, **settings)
    logits = sibling(ids, attention_mask=mask).logits
    with lc.attach(model, full(model)):
        assert torch.equal(sibling.generate(ids, **settings), expected)
        torch.testing.assert_close(sibling(ids, attention_mask=mask).logits, logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_new"])
@torch.no_grad()
def test_a_pass_without_a_cache_is_the_models_own(family):
    model = model_of(family)
    ids, mask = prompts([9, 5])
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    config, maps = less(model, capacity=4)
    with lc.attach(model, config, maps):
        out = model(ids, attention_mask=mask, use_cache=False)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits, expected)


def test_training():
    model = build("llama", attention_dropout=0.1)
    ids, _ = prompts([9])
    with lc.attach(model, full(model)):
        loss = model(ids, labels=ids).loss
        with pytest.raises(NotImplementedError, match="backward: LessCache has no gradients"):
            loss.backward()
        model.train()
        with pytest.raises(ValueError, match=r"dropout: got 0.1"):
            model(ids)
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["num_layers", "query_heads", "head_dim", "kv_heads", "scale"])
def test_a_config_that_is_not_the_models(name):
    model = model_of("llama")
    before = traces(model)
    config = full(model)
    value = {"query_heads": 8, "scale": 1.0, "kv_heads": 4}.get(name) or getattr(config, name) + 1
    with pytest.raises(ValueError, match=rf"config: .*{name} = {value}, but llama has"):
        lc.attach(model, config.replace(**{name: value}))
    assert traces(model) == before


def test_arguments_of_the_wrong_kind():
    model = model_of("llama")
    config, maps = less(model)
    with pytest.raises(TypeError, match="model: got Linear"):
        lc.attach(torch.nn.Linear(2, 2), config, maps)
    with pytest.raises(TypeError, match="config: got LlamaConfig"):
        lc.attach(model, model.config, maps)
    with pytest.raises(ValueError, match="maps: got None"):
        lc.attach(model, config)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        lc.attach(model, config, maps, backend="fast")
    other = build("llama", num_hidden_layers=3)
    with pytest.raises(ValueError, match="maps: made for 2 layers"):
        lc.attach(other, less(other)[0], maps)


LLAMA4 = {
    **GQA, "head_dim": 12, "intermediate_size_mlp": 64, "num_local_experts": 2, "moe_layers": [],
    "no_rope_layers": [1, 0], "attention_chunk_size": 64, "floor_scale": 4,
}  # fmt: skip
REFUSED = {
    "falcon": {"alibi": True},
    "gpt2": {"n_embd": 48},
    "gpt_neox": {"intermediate_size": 64},
    "bloom": {"n_layer": 2},
    "mamba": {"state_size": 4},
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "intermediate_size": 64,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
    },
    "gpt_oss": {
        **GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
    "qwen3_next": {
        **GQA, "num_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {**GQA, "sliding_window": 5},
    "llama4_text": LLAMA4,
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_model(kind):
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**COMMON, **REFUSED[kind]}))
    config = lc.CacheConfig(2, 4, 4, 12, 8, lc.H2O(recent=2), rank=0)
    before = traces(model)
    with pytest.raises(ValueError, match="sliding window" if kind == "mistral" else kind):
        lc.attach(model, config)
    assert traces(model) == before


def test_llama_4_says_why_and_is_right_without_what_makes_it_wrong():
    kind = CONFIG_MAPPING["llama4_text"]
    model = AutoModelForCausalLM.from_config(kind(**{**COMMON, **LLAMA4})).eval()
    with pytest.raises(ValueError, match="temperature of its attention depends on the past"):
        lc.attach(model, full(model))
    parameters = {**COMMON, **LLAMA4, "attn_temperature_tuning": False}
    model = AutoModelForCausalLM.from_config(kind(**parameters)).eval()
    ids, _ = prompts([14])
    with torch.no_grad():
        expected = model(ids).logits
        with lc.attach(model, full(model)) as handle:
            cache, found = handle.new_cache(), []
            for start, stop in [(0, 5), (5, 6), (6, 14)]:
                found.append(model(ids[:, start:stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_scale_that_the_modules_do_not_show():
    parameters = {"ffn_dim": 64, "word_embed_proj_dim": 48}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["opt"](**{**COMMON, **parameters}))
    # OPT scales its queries itself, and asks for a scale of 1.
    with (
        lc.attach(model.eval(), full(model)),
        pytest.raises(ValueError, match=r"opt attends with 1.0"),
    ):
        model(prompts([4])[0])


def test_encoder_decoders():
    small = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, **small))
    with pytest.raises(ValueError, match="t5 is not a decoder of text alone"):
        lc.attach(model, lc.CacheConfig(1, 2, 2, 4, 8, lc.H2O(recent=2), rank=0))


def test_softcap_that_is_not_the_models():
    model = model_of("gemma2")
    config = full(model)
    assert config.softcap == 5.0
    assert config.scale == 24**-0.5
    with (
        lc.attach(model, config.replace(softcap=None)),
        pytest.raises(ValueError, match=r"softcap = None, but gemma2 has 5.0"),
    ):
        model(prompts([4])[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "falcon_mha"])
def test_inputs_that_do_not_fit(family):
    model = model_of(family)
    ids, mask = prompts([6, 6])
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        for wrong in (mask, mask[:1], torch.ones(2, 1, 6, 12), {"full_attention": mask}):
            with pytest.raises(ValueError, match=r"attention_mask: .*\(2, 12\)"):
                model(ids, attention_mask=wrong, past_key_values=cache)
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids, output_attentions=True)
        with pytest.raises(TypeError, match="got DynamicCache, expected a LessCache"):
            model(ids, past_key_values=DynamicCache())
        assert cache.get_seq_length() == 6
    with lc.attach(model, full(model)), pytest.raises(ValueError, match="another config"):
        model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"less_cache\.attach"):
        model(ids, past_key_values=cache)


def test_the_decoder_without_its_head():
    model = model_of("llama")
    ids, mask = prompts([7, 5])
    with torch.no_grad():
        expected = model.model(ids, mask).last_hidden_state
        with lc.attach(model.model, full(model)):
            out = model.model(ids, mask)
    assert isinstance(out.past_key_values, lc.LessCache)
    torch.testing.assert_close(out.last_hidden_state[mask.bool()], expected[mask.bool()])


def test_the_package_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
import less_cache
from less_cache import *
for name in ("attach", "LessCache"):
    try:
        getattr(less_cache, name)
    except ImportError as error:
        assert "less_cache[transformers]" in str(error), error
    else:
        raise SystemExit("no error")
assert not hasattr(less_cache, "nonsense")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, less_cache; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
