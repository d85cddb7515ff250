"""Text generation with a transformers model and a LESS cache, and what the cache costs.

    python examples/transformers_generate.py
    python examples/transformers_generate.py --model meta-llama/Llama-3.2-1B --cache my-llama-5pct
    python examples/transformers_generate.py --model meta-llama/Llama-3.2-1B --maps my-llama-less

Without ``--model`` a small random Llama stands in, so that the example runs anywhere. ``--cache``
is a whole cache in one folder. Without it and without ``--maps`` the policy runs alone, since
untrained maps would only add noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import less_cache as lc

PROMPTS = ["The cache keeps", "In a language model, the memory of"]


def random_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of a few hundred thousand weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def main(
    model: str = typer.Option("", help="Folder or hub id; default: a small random model."),
    maps: str = typer.Option("", help="Folder or hub id of trained feature maps."),
    cache: str = typer.Option("", help="Folder or hub id of a whole cache: no maps or capacity."),
    capacity: float | None = typer.Option(
        None, help="Pairs a head keeps: a share of the longest length; default: 0.05."
    ),
    new_tokens: int = typer.Option(256, help="Tokens to generate."),
    snapshot: str = typer.Option("", help="Folder to save the cache in and go on from."),
) -> None:
    """Generate for two prompts of different lengths, then compare the caches' sizes."""
    if cache and (maps or capacity is not None):
        raise typer.BadParameter(
            "a whole cache has maps and slots of its own", param_hint="--cache"
        )
    if model:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        llm = AutoModelForCausalLM.from_pretrained(model)
        inputs = dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))
    else:
        tokenizer, llm = None, random_model()
        ids = torch.randint(3, 512, (2, 24), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
    llm = llm.eval()

    if cache:
        # Config, maps and bases of codes; refused where it was made for another model.
        recipe = lc.CacheRecipe.from_pretrained(cache)
    else:
        trained = lc.FeatureMaps.from_pretrained(maps) if maps else None
        config = lc.CacheConfig.from_model(
            llm.config,
            capacity=0.05 if capacity is None else capacity,
            policy=lc.H2O(),
            rank=trained.rank if trained else 0,
        )
        recipe = lc.CacheRecipe(config, trained)
    with lc.attach(llm, recipe) as less:
        past = less.new_cache()
        tokens = llm.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, past_key_values=past
        )
        if snapshot:
            past.save(snapshot)
            past = less.load_cache(Path(snapshot))
            # The mask covers all that the cache has seen: the prompt's padding, then the answer.
            prompt = inputs["attention_mask"]
            answer = torch.ones_like(tokens[:, prompt.shape[1] :])
            tokens = llm.generate(
                tokens,
                attention_mask=torch.cat([prompt, answer], 1),
                max_new_tokens=8,
                do_sample=False,
                past_key_values=past,
            )

    for row in tokens:
        print(tokenizer.decode(row, skip_special_tokens=True) if tokenizer else row[-16:].tolist())
    full = len(tokens) * past.state.config.full_cache_bytes(tokens.shape[1])
    print(f"tokens per sequence: {tokens.shape[1]}")
    print(f"full cache:          {full:>12,} bytes, growing with each token")
    print(f"less_cache:          {past.state.nbytes:>12,} bytes, whatever the length")


if __name__ == "__main__":
    typer.run(main)
