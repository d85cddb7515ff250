"""The caches that ship: within their bytes, for this model, and decoding as they are judged."""

import pytest
import torch

import less_cache as lc
from less_cache import reference_model
from less_cache.integrations.transformers.teacher_forcing import small_cache_logits


@pytest.mark.parametrize("budget", ["5%", "2.5%", "1.25%"])
def test_the_bytes_are_what_the_name_says(budget):
    recipe = lc.CacheRecipe.from_pretrained(reference_model.tuned(budget))
    share = float(budget.removesuffix("%")) / 100
    whole = recipe.config.full_cache_bytes(1024, "float16")
    # They were tuned when a coded slot had a score, and a position of 32 bits.
    slots = sum(layer.slots for layer in recipe.config.layers if layer.quantization is not None)
    then = recipe.config.bytes_per_sequence("float16") + 6 * slots
    assert 0.99 * share * whole < then <= share * whole
    assert recipe.model["name"] == reference_model.NAME
    assert recipe.record["license"] == "Apache-2.0"
    assert (reference_model.tuned(budget) / "README.md").read_text() == recipe.card()


@torch.no_grad()
def test_decoding_gives_what_is_judged():
    model, tokenizer = reference_model.load()
    text = reference_model.held_out_documents()[0].text[:600]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:60]])
    folder = reference_model.tuned("1.25%")
    recipe = lc.CacheRecipe.from_pretrained(folder)
    assert recipe.maps is not None
    assert min(map(min, recipe.config.capacities)) < ids.shape[1] // 4
    wanted = small_cache_logits(
        model, recipe.config, list(recipe.maps), ids, transforms=recipe.transforms
    )
    found = []
    with lc.attach(model, folder) as handle:
        cache = handle.new_cache()
        for at in range(ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            found.append(out.logits)
    near = (torch.cat(found, 1) - wanted).abs().amax(2)[0]
    # A code at a level's edge may fall to the other side; most tokens see none such.
    assert near.median() < 1e-3
    assert near.max() < 0.5
