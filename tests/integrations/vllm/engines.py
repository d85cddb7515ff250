"""Engines with LESS on the reference model, and what they are to answer."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import less_cache as lc
from less_cache import reference_model
from less_cache.policies import DEFAULT_POLICY, parse_policy
from less_cache.reference_model.shipped_maps import END_TO_END, FOLDER

CACHE = {"capacity": "5%", "policy": "h2o", "maps": str(FOLDER / "h2o-5" / END_TO_END)}
"""What ships with the package: 52 slots a head and rank 8."""

ENGINE = {
    "model": str(reference_model.path()),
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "enforce_eager": True,
    "attention_backend": "CUSTOM",
    "kv_cache_memory_bytes": 64 * 2**20,
}


def options(less: dict[str, Any] | None = None, **engine: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; `less` in place of the shipped cache."""
    return {
        **ENGINE,
        "additional_config": {"less_cache": CACHE if less is None else less},
        **engine,
    }


@contextmanager
def engine(less: dict[str, Any] | None = None, **changes: Any) -> Iterator[Any]:
    """``vllm.LLM`` in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**options(less, **changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: Any, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(given, parameters, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in found]


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    """The beginnings of held-out documents."""
    _, tokenizer = reference_model.load()
    texts = [document.text for document in reference_model.held_out_documents()]
    return [
        tokenizer(texts[i % len(texts)])["input_ids"][:length] for i, length in enumerate(lengths)
    ]


def config_of(model: Any, less: dict[str, Any]) -> lc.CacheConfig:
    """The config that the options stand for."""
    bits = less.get("bits")
    rank = lc.FeatureMaps.from_pretrained(less["maps"]).rank if "maps" in less else 0
    return lc.CacheConfig.from_model(
        model.config,
        capacity=less["capacity"],
        policy=parse_policy(less.get("policy", DEFAULT_POLICY)),
        rank=rank,
        dtype=model.dtype,
        quantization=None if bits is None else lc.Quantization(bits, bits),
    )


def expected(
    prompts: Sequence[list[int]],
    tokens: int,
    *,
    chunk: int = 1024,
    less: dict[str, Any] | None = None,
    model: Any = None,
) -> list[list[int]]:
    """What `attach` and transformers answer, each prompt alone, in the same chunks."""
    less = less or CACHE
    model = model or reference_model.load()[0]
    config = config_of(model, less)
    maps = lc.FeatureMaps.from_pretrained(less["maps"]) if "maps" in less else None
    return [_greedy(model, config, maps, prompt, tokens, chunk) for prompt in prompts]


@torch.no_grad()
def _greedy(
    model: Any,
    config: lc.CacheConfig,
    maps: lc.FeatureMaps | None,
    prompt: list[int],
    tokens: int,
    chunk: int,
) -> list[int]:
    found: list[int] = []
    with lc.attach(model, config, maps) as attachment:
        cache = attachment.new_cache(1)
        for start in range(0, len(prompt), chunk):
            piece = torch.tensor([prompt[start : start + chunk]])
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
        for _ in range(tokens):
            found.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits
    return found
