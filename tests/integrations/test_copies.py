"""Caches are copied for several continuations; attached models say that they are not."""

import copy
import pickle

import pytest
import torch

import less_cache as lc
from tests.integrations.models import build, less, model_of, prompts

COPIES = {
    "clone": lambda cache: cache.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_mqa"])
def test_a_prompts_cache_serves_several_continuations(family, copied):
    model = build(family)
    config, maps = less(model)
    prompt, _ = prompts([12])
    ends = [prompts([n], seed=n)[0] for n in (2, 3)]
    with torch.no_grad(), lc.attach(model, config, maps) as handle:
        expected = []
        for end in ends:
            cache = handle.new_cache()
            model(prompt, past_key_values=cache, logits_to_keep=1)
            text = torch.cat([prompt, end], 1)
            expected.append(model.generate(text, past_key_values=cache, **GREEDY))
        first = handle.new_cache()
        model(prompt, past_key_values=first, logits_to_keep=1)
        for end, tokens in zip(ends, expected, strict=True):
            mine = copied(first)
            assert mine.get_seq_length() == 12
            assert mine.nbytes == first.nbytes
            text = torch.cat([prompt, end], 1)
            assert torch.equal(model.generate(text, past_key_values=mine, **GREEDY), tokens)
            assert first.get_seq_length() == 12
            assert first.state.length.tolist() == [12]


def test_empty_caches_are_copied_too():
    model = model_of("gemma2")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        for size in (None, 2):
            other = handle.new_cache(batch_size=size).clone()
            assert other.state is None
            assert other.batch_size == (-1 if size is None else size)
            model(prompts([9, 9])[0], past_key_values=other)
            assert other.get_seq_length() == 9


def test_a_copied_manager_and_config_are_not_duplicated():
    model = model_of("llama")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        model(prompts([9])[0], past_key_values=cache)
        other = copy.deepcopy({"cache": cache})["cache"]
    assert other.manager is cache.manager
    assert other.state.layers[0].keys.data_ptr() != cache.state.layers[0].keys.data_ptr()


def test_a_pass_that_broke_off_is_not_copied():
    model = model_of("llama")
    config, maps = less(model)
    ids, _ = prompts([9])
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="broke off between layers"):
            cache.clone()


@pytest.mark.parametrize("family", ["llama", "falcon_new"])
def test_an_attached_model_says_what_to_do_before_it_is_copied(family):
    model = build(family)
    config, maps = less(model)
    ids, _ = prompts([9])
    with lc.attach(model, config, maps):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match=r"attached to it.*detach it, copy or pickle"):
                way(model)
        expected = model.generate(ids, **GREEDY)
    other = copy.deepcopy(model)
    with lc.attach(other, config, maps):
        assert torch.equal(other.generate(ids, **GREEDY), expected)
    assert pickle.loads(pickle.dumps(model))(ids).logits.shape == (1, 9, 97)
