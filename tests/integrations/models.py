"""Tiny random models of each family, built from configurations."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import less_cache as lc

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 64}
GEMMA = {
    **GQA,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

FAMILIES = {
    "llama": ("llama", GQA),
    "llama_mha": ("llama", {**GQA, "num_key_value_heads": 4}),
    "mistral": ("mistral", {**GQA, "sliding_window": None}),
    "qwen2": ("qwen2", GQA),
    "qwen2_sliding": (
        "qwen2",
        {**GQA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**GQA, "head_dim": 16}),
    "phi3": ("phi3", {**GQA, "sliding_window": None}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mqa": ("falcon", {"multi_query": True}),
    "falcon_mha": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "granite": ("granite", {**GQA, "attention_multiplier": 0.2}),
}


@functools.cache
def model_of(family, attention=None):
    """One model of a family for all tests; each gives it back as it was."""
    return build(family, attention=attention)


def build(family, *, attention=None, seed=0, **changes):
    kind, parameters = FAMILIES[family]
    # Gemma 2 has no other implementation, because of its soft-cap.
    attention = attention or ("eager" if kind == "gemma2" else "sdpa")
    config = CONFIG_MAPPING[kind](**{**COMMON, **parameters, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        # The initialiser leaves norms at 1; a soft-cap or a scale must be felt in the logits.
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model


def prompts(lengths, *, side="left", seed=1):
    """Random ids [B, S] and their mask, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, columns] = torch.randint(3, 97, (length,), generator=generator)
        mask[row, columns] = 1
    return ids, mask


def full(model, **changes):
    """The config of a cache that evicts nothing."""
    return lc.CacheConfig.from_model(
        model.config, **{"capacity": 64, "policy": lc.FullCache(), "rank": 0, **changes}
    )


def less(model, capacity=6, policy=None, rank=4, kind="exp"):
    """Config and maps of a small cache whose low-rank state is felt."""
    config = lc.CacheConfig.from_model(
        model.config, capacity=capacity, policy=policy or lc.H2O(recent=2), rank=rank
    )
    maps = lc.FeatureMaps.initialise(config, kind=kind, hidden=8)
    return config, lc.FeatureMaps.from_tensors(
        [
            layer and {n: 0 * x if n == "psi_b" else x for n, x in layer.tensors.items()}
            for layer in maps
        ]
    )


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)
