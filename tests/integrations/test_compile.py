"""A compiled model under `attach`: a step is one graph, compiled once, with eager's numbers."""

import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import less_cache as lc
from tests.integrations.models import build, full, less, model_of, prompts

STEPS = 20
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def decode(model, step, handle, start=8, masked=False):
    """Logits of a prompt's last token and of steps, and the cache."""
    ids, mask = prompts([start + STEPS, start])
    cache = handle.new_cache()
    found = [model(ids[:, :start], past_key_values=cache, logits_to_keep=1).logits]
    for i in range(start, start + STEPS):
        given = {"attention_mask": mask[:, : i + 1].contiguous()} if masked else {}
        found.append(step(ids[:, i : i + 1], past_key_values=cache, **given).logits)
    return torch.cat(found, 1), cache


def compiled(model, way, **settings):
    """The model compiled, or called with its forward compiled."""
    if way == "model":
        return torch.compile(model, **settings)
    own, forward = model.forward, torch.compile(model.forward, **settings)

    def step(*args, **kwargs):
        model.forward = forward
        try:
            return model(*args, **kwargs)
        finally:
            model.forward = own

    return step


@pytest.mark.parametrize("way", ["model", "forward"])
@pytest.mark.parametrize(
    ("family", "policy", "scoring"),
    [
        ("llama", lc.H2O(recent=2), False),
        ("llama", lc.SinkWindow(sinks=1, recent=2), True),
        ("falcon_new", lc.H2O(recent=2), False),
        ("gemma2", lc.H2O(recent=2), False),
    ],
)
def test_a_decode_step_is_one_graph_compiled_once(family, policy, scoring, way):
    model = build(family)
    config, maps = less(model, policy=policy)
    counter = CompileCounterWithBackend("aot_eager")
    with lc.attach(model, config, maps, scoring=scoring) as handle:
        expected, plain = decode(model, model, handle)
        step = compiled(model, way, fullgraph=True, backend=counter)
        found, cache = decode(model, step, handle)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == plain.get_seq_length() == 8 + STEPS
    # transformers' own sliding layers count in Python: their second step is compiled anew.
    assert counter.frame_count == (2 if cache.sliding_layers else 1)


def test_a_mask_that_grows_is_compiled_for_any_width():
    model = model_of("llama")
    config, maps = less(model)
    counter = CompileCounterWithBackend("aot_eager")
    with lc.attach(model, config, maps) as handle:
        expected, _ = decode(model, model, handle, masked=True)
        step = torch.compile(model, fullgraph=True, backend=counter)
        found, _ = decode(model, step, handle, masked=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    model = model_of("llama")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        expected, _ = decode(model, model, handle)
        found, _ = decode(model, torch.compile(model, fullgraph=True), handle)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_eager_and_compiled_steps_take_turns():
    model = model_of("llama")
    config, maps = less(model)
    ids, _ = prompts([20])
    with torch.no_grad(), lc.attach(model, config, maps) as handle:
        step = torch.compile(model, fullgraph=True, backend="eager")
        plain, mixed = handle.new_cache(), handle.new_cache()
        for cache in (plain, mixed):
            model(ids[:, :8], past_key_values=cache, logits_to_keep=1)
        for i in range(8, 20):
            expected = model(ids[:, i : i + 1], past_key_values=plain).logits
            which = step if i % 3 else model
            found = which(ids[:, i : i + 1], past_key_values=mixed).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert i % 4 or mixed.get_seq_length() == i + 1
        assert mixed.clone().get_seq_length() == 20
        mixed.reset()
        assert mixed.get_seq_length() == 0


def test_generate_with_a_compiled_forward():
    model = build("llama")
    config, maps = less(model)
    ids, mask = prompts([12, 7])
    with lc.attach(model, config, maps):
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        model.forward = torch.compile(model.forward, backend="eager")
        found = model.generate(ids, attention_mask=mask, **GREEDY)
        del model.forward
    assert torch.equal(found, expected)


@torch.no_grad()
def test_what_was_compiled_follows_attaching_and_detaching():
    model = build("llama")
    config, maps = less(model)
    ids, _ = prompts([28])
    own = model(ids, use_cache=False).logits
    step = torch.compile(model, backend="eager")
    torch.testing.assert_close(step(ids, use_cache=False).logits, own)
    for changes in ({}, {"capacity": 9}, {}):
        with lc.attach(model, config.replace(**changes), maps) as handle:
            expected, _ = decode(model, model, handle)
            found, _ = decode(model, step, handle)
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(step(ids, use_cache=False).logits, own)


@torch.no_grad()
def test_a_prompt_may_be_compiled_too():
    model = build("llama")
    config, maps = less(model)
    ids, _ = prompts([12])
    with lc.attach(model, config, maps):
        expected = model(ids, logits_to_keep=1)
        step = torch.compile(model, backend="eager")
        found = step(ids, logits_to_keep=1)
        assert torch.equal(found.logits, expected.logits)
        assert found.past_key_values.get_seq_length() == 12
        with pytest.warns(lc.FullAttentionWarning) as caught:
            step(ids)
        assert len(caught.list) == 1


def test_a_compiled_model_is_scored():
    model = build("llama")
    config, maps = less(model)
    ids, _ = prompts([17, 17])
    with lc.attach(model, config, maps, scoring=True), warnings.catch_warnings():
        warnings.simplefilter("error", lc.FullAttentionWarning)
        step = torch.compile(model, backend="eager")
        for settings in ({}, {"use_cache": False}):
            model.zero_grad()
            model(ids, labels=ids, **settings).loss.backward()
            expected = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            step(ids, labels=ids, **settings).loss.backward()
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_cache_of_another_attachment_is_taken_over():
    model = model_of("llama")
    ids, _ = prompts([12])
    with torch.no_grad(), lc.attach(model, full(model)) as handle:
        cache = handle.new_cache()
        model(ids[:, :8], past_key_values=cache)
    with torch.no_grad(), lc.attach(model, full(model)) as handle:
        model(ids[:, 8:], past_key_values=cache)
        assert cache.manager is handle.manager
    assert cache.get_seq_length() == 12
