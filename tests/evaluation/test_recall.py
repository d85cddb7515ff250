"""What is recalled is what a decoder that evicts at every token would say."""

import pytest
import torch

import less_cache as lc
from less_cache.evaluation.needles import Example
from less_cache.evaluation.perplexity import Contestant
from less_cache.evaluation.recall import recall
from tests.integrations.models import less, model_of
from tests.integrations.test_scoring import decoded, numbers_tokenizer

EXAMPLES = [
    Example([5, 9, 7, 33, 12, 60, 41, 8, 3, 71, 30, 31], [4, 50, 6], ("4",)),
    Example([8, 30, 31, 12, 90, 14, 44], [9], ("9", "17")),
    Example([6, 7, 8, 21, 22, 23, 24, 25, 26], [61, 5], ("61",)),
]


@torch.no_grad()
def one_by_one(model, config, maps, example, count):
    with lc.attach(model, config, maps) as handle:
        text = torch.tensor([[*example.prompt, *example.reference]])
        logits = decoded(model, text[:, :-1], torch.ones_like(text), handle.new_cache())
        own = logits[0, -len(example.reference) :].log_softmax(1)
        nats = -own.gather(1, torch.tensor(example.reference)[:, None]).mean()
        cache = handle.new_cache()
        prompt = torch.tensor([example.prompt])
        logits = decoded(model, prompt, torch.ones_like(prompt), cache)
        tokens = []
        for _ in range(count):
            tokens.append(logits[:, -1:].argmax(2))
            logits = model(tokens[-1], past_key_values=cache).logits
    return float(nats), torch.cat(tokens, 1)[0]


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_new"])
def test_it_equals_decoding(family, batch):
    model, tokenizer = model_of(family), numbers_tokenizer()
    config, maps = less(model)
    found = recall(
        model, tokenizer, EXAMPLES, Contestant("LESS", config, maps), new_tokens=5, batch=batch
    )
    for example, own in zip(EXAMPLES, found, strict=True):
        nats, tokens = one_by_one(model, config, maps, example, 5)
        assert own.nats == pytest.approx(nats, rel=1e-3)
        assert own.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_full_cache_is_the_model_itself():
    model, tokenizer = model_of("llama"), numbers_tokenizer()
    found = recall(model, tokenizer, EXAMPLES, Contestant("full cache"), new_tokens=4)
    for example, own in zip(EXAMPLES, found, strict=True):
        ids = torch.tensor([[*example.prompt, *example.reference]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(1)[len(example.prompt) - 1 : -1]
        nats = -scores.gather(1, torch.tensor(example.reference)[:, None]).mean()
        assert own.nats == pytest.approx(float(nats), rel=1e-4)
        prompt = torch.tensor([example.prompt])
        whole = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert own.text == tokenizer.decode(
            whole[0, len(example.prompt) :], skip_special_tokens=True
        )


def test_the_share_counts_answers_in_any_order(monkeypatch):
    model, tokenizer = model_of("llama"), numbers_tokenizer()
    (only,) = recall(model, tokenizer, EXAMPLES[:1], Contestant("full cache"), new_tokens=4)
    said = only.text.split()
    asked = Example(EXAMPLES[0].prompt, [4], (said[2], said[0], "no number", "nor this"))
    (found,) = recall(model, tokenizer, [asked], Contestant("full cache"), new_tokens=4)
    assert found.share == 0.5
