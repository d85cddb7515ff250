"""`attach` with what does not fit, bad calls of attached models: model and cache stay intact."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc

pytest.importorskip("transformers")

from tests.integrations.models import build, less, model_of, prompts

from .arrays import ODDITIES
from .files import VALUES, contents, sign
from .rule import Refusal, outcome, refused, state_bits

EXAMPLES = 25
FAMILIES = ("llama", "mistral", "gemma2", "falcon_new")


def picture(model):
    """What an attach that fails must leave alone."""
    hooks = [
        (len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part)))
        for part in model.modules()
    ]
    return hooks, model.config._attn_implementation, sorted(vars(model))


CHANGES = {
    "layers": {"num_layers": 3, "capacity": 6, "policy": lc.H2O()},
    "heads": {"query_heads": 8},
    "kv-heads": {"kv_heads": 4, "capacity": 6},
    "head-dim": {"head_dim": 8},
    "scale": {"scale": 0.5},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_another_models_config(family, changes):
    model = model_of(family)
    config, maps = less(model)
    config = config.replace(**changes)
    refused(lambda: lc.attach(model, config, maps), "config", unchanged=lambda: picture(model))


@pytest.mark.parametrize("family", FAMILIES)
@given(odd=st.sampled_from(ODDITIES))
def test_oddities(family, odd):
    model = model_of(family)
    config, maps = less(model)
    call = {"model": model, "config": config, "maps": maps, "backend": "torch", "scoring": False}
    for name in call:
        if name == "scoring" and isinstance(odd, bool):
            continue
        refused(
            lambda name=name: lc.attach(**{**call, name: odd}),
            name,
            unchanged=lambda: picture(model),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_that_do_not_fit(family):
    model = model_of(family)
    config, maps = less(model)
    for changes in ({"rank": 3}, {"rank": 0}, {"hidden": 9}):
        other = config.replace(**changes)
        refused(lambda o=other: lc.attach(model, o, maps), "maps", unchanged=lambda: picture(model))
    refused(lambda: lc.attach(model, config), "maps", unchanged=lambda: picture(model))
    with lc.attach(model, config, maps):
        refused(lambda: lc.attach(model, config, maps), "model", unchanged=lambda: picture(model))
    refused(
        lambda: (
            lc.attach(model.model, None, maps)
            if family != "falcon_new"
            else lc.attach(model, None, maps)
        ),
        "config",
        unchanged=lambda: picture(model),
    )


def test_models_that_are_none():
    config, maps = less(model_of("llama"))
    for part in (
        torch.nn.Linear(2, 2),
        model_of("llama").model.layers[0],
        model_of("llama").config,
    ):
        refused(lambda p=part: lc.attach(p, config, maps), "model")


def cache_bits(cache):
    own = None if cache.state is None else state_bits(cache.state)
    return own, cache.seen.number, cache.attended


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_another_kind(family):
    """A cache of another model, config, batch or none at all; the right one goes on as before."""
    model, other = model_of(family), build("llama", num_hidden_layers=3, seed=1)
    config, maps = less(model)
    with lc.attach(model, config, maps, backend="torch") as handle:
        ids, mask = prompts([5, 9])
        cache = handle.new_cache()
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        strange = lc.attach(other, *less(other))
        strange.detach()
        long = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = {"input_ids": ids[:, -1:], "attention_mask": long}
        for bad in (
            {"past_key_values": strange.new_cache()},
            {"past_key_values": handle.new_cache(3)},
            {"past_key_values": cache, "input_ids": ids[:1, -1:], "attention_mask": long[:1]},
        ):
            with torch.no_grad():
                refused(
                    lambda b=bad: model(**{**step, **b}),
                    *("past_key_values", "batch_size", "state", "cache", "input_ids", "k", "q"),
                    unchanged=lambda: cache_bits(cache),
                )
        twin = copy.deepcopy(cache)
        with torch.no_grad():
            first = model(**step, past_key_values=cache).logits
            second = model(**step, past_key_values=twin).logits
        assert torch.equal(first, second)


@given(odd=st.sampled_from(ODDITIES))
def test_a_caches_own_calls(odd):
    model = model_of("llama")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache()
        ids, mask = prompts([5, 9])
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
        for names, call in {
            ("repeats", "count"): cache.batch_repeat_interleave,
            ("rows", "indices", "beam_idx"): cache.batch_select_indices,
            ("rows", "beam_idx"): cache.reorder_cache,
        }.items():
            before = cache.clone()
            found = outcome(lambda: call(odd), *names, unchanged=lambda: cache_bits(cache))  # noqa: B023
            if not isinstance(found, Refusal):
                cache = before
                break
        if odd is not None:
            found = outcome(lambda: handle.new_cache(odd), "batch_size")
            assert isinstance(found, Refusal) or found.batch_size == odd
        refused(lambda: handle.load_cache(odd), "folder", f"{odd}", "state.safetensors")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@given(value=VALUES, how=st.sampled_from(["value", "missing", "deep", "length"]), data=st.data())
def test_what_lies_beside_a_saved_cache(family, value, how, data):
    model = model_of(family)
    config, maps = less(model)
    with (
        tempfile.TemporaryDirectory() as folder,
        lc.attach(model, config, maps) as handle,
        torch.no_grad(),
    ):
        cache = handle.new_cache()
        ids, mask = prompts([5, 9])
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.save(folder)
        (path,) = Path(folder).glob("layers.*")
        header, tensors = contents(path)
        field = data.draw(st.sampled_from(sorted(set(header) - {"sha256"})))
        if how == "missing":
            del header[field]
        elif how == "length" and tensors:
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = tensors[name][..., :-1].contiguous()
        else:
            header[field] = "[" * 100_000 if how == "deep" else json.dumps(value)
        sign(path, header, tensors)
        found = outcome(lambda: handle.load_cache(folder), str(path))
        assert isinstance(found, Refusal) or not tensors
