"""Summaries with a cache, and their ROUGE."""

import pytest
import torch

import less_cache as lc
from less_cache.evaluation.perplexity import Contestant
from less_cache.evaluation.summaries import rouge, write_summaries
from tests.integrations.models import build, less
from tests.integrations.test_scoring import numbers_tokenizer

PROMPTS = [[5, 9, 7, 33, 12, 60, 41, 8, 3, 71, 30, 31], [8, 30, 31, 12, 90, 14, 44], [6, 7, 8]]


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_ones_are_those_of_the_attached_model(model, batch):
    config, maps = less(model)
    tokenizer = numbers_tokenizer()
    settings = {"new_tokens": 8, "temperature": 0, "batch": batch, "progress": False}
    found = write_summaries(model, tokenizer, PROMPTS, Contestant("LESS", config, maps), **settings)
    expected = []
    with lc.attach(model, config, maps):
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            whole = model.generate(ids, max_new_tokens=8, do_sample=False)
            expected.append(tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True))
    assert found == [text.strip() for text in expected]
    whole = write_summaries(model, tokenizer, PROMPTS, Contestant("full"), **settings)
    assert whole != found


def test_draws_are_seeded_and_leave_torchs_generator_alone(model):
    def drawn(seed):
        return write_summaries(
            model,
            numbers_tokenizer(),
            PROMPTS,
            Contestant("full"),
            new_tokens=8,
            temperature=3.0,
            seed=seed,
            progress=False,
        )

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = drawn(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(1) == first
    assert drawn(2) != first


def test_what_comes_after_the_stop_is_dropped(model, monkeypatch):
    tokenizer = numbers_tokenizer()
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " A summary. \n###\nArticle")
    found = write_summaries(
        model, tokenizer, PROMPTS[:1], Contestant("full"), new_tokens=2, progress=False
    )
    assert found == ["A summary."]


def test_rouge_is_in_percent():
    pytest.importorskip("rouge_score", reason="needs less_cache[paper]")
    found = rouge(["the cat sat", "x"], ["the cat ran", "y"])
    assert found == {
        "ROUGE-1": pytest.approx(100 / 3),
        "ROUGE-2": pytest.approx(25),
        "ROUGE-L": pytest.approx(100 / 3),
    }
