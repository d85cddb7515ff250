"""`attach` takes a whole recipe, or where it lies, for the model that it was made for."""

import pytest
import torch

import less_cache as lc
from tests.integrations.models import build, less

pytest.importorskip("transformers")

from less_cache.integrations.introspection import description


def test_a_folder_says_what_its_parts_say(tmp_path):
    model = build("llama")
    config, maps = less(model)
    lc.CacheRecipe(config, maps, model=description(model.config)).save_pretrained(tmp_path)
    ids = torch.arange(3, 33).unsqueeze(0)
    outs = []
    for parts in ((config, maps), (tmp_path,), (str(tmp_path),)):
        with lc.attach(model, *parts), torch.no_grad():
            outs.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_recipe_is_taken_in_the_models_dtype(tmp_path):
    model = build("llama")
    config, maps = less(model)
    made = lc.CacheRecipe(config, maps, model=description(model.config))
    assert lc.attach(model.to(torch.bfloat16), made).manager.config.dtype == "bfloat16"


def test_another_model_is_refused_with_what_differs(tmp_path):
    model, other = build("llama"), build("qwen2")
    config, maps = less(model)
    made = lc.CacheRecipe(config, maps, model=description(model.config))
    with pytest.raises(ValueError, match=r"recipe: made for a model of .*model_type = 'llama'"):
        lc.attach(other, made)
    lc.attach(model, made).detach()


def test_what_a_recipe_has_is_not_given_again(tmp_path):
    model = build("llama")
    config, maps = less(model)
    made = lc.CacheRecipe(config, maps)
    with pytest.raises(ValueError, match="a recipe has maps and transforms of its own"):
        lc.attach(model, made, maps)
    with pytest.raises(TypeError, match="config: got dict, expected a CacheConfig, a CacheRecipe"):
        lc.attach(model, {})
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lc.attach(model, str(tmp_path / "nowhere"))
