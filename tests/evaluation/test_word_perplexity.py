"""Word perplexity: each token once, in decode semantics, by lm_eval's rules."""

import importlib
import math

import pytest
import torch

import less_cache as lc
from less_cache.evaluation.perplexity import Contestant
from less_cache.evaluation.word_perplexity import (
    count_words,
    score_words,
    stretches_of,
    without_wikitext_marks,
)
from tests.integrations.models import less, model_of
from tests.integrations.test_scoring import decoded


def test_stretches_are_those_of_lm_evals_example():
    found = [(s.ids[:-1], s.ids[1:][-s.scored :]) for s in stretches_of(0, [*range(10)], 99, 4)]
    assert found == [
        ([99, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    assert [(s.ids, s.scored) for s in stretches_of(3, [5, 6], 9, 4)] == [([9, 5, 6], 2)]
    assert stretches_of(0, [], 9, 4) == []


@pytest.mark.parametrize("length", [1, 4, 7, 30])
@pytest.mark.parametrize("count", [1, 4, 8, 23])
def test_every_token_is_scored_once(length, count):
    found = stretches_of(0, [*range(count)], -1, length)
    scored = [token for s in found for token in s.ids[-s.scored :]]
    assert scored == [*range(count)]
    assert all(len(s.ids) <= length + 1 and s.scored < len(s.ids) for s in found)


@pytest.mark.parametrize("batch", [1, 3])
def test_nats_are_those_of_decoding(batch):
    model = model_of("llama")
    config, maps = less(model)
    draws = torch.Generator().manual_seed(3)
    documents = [
        (torch.randint(3, 97, (n,), generator=draws).tolist(), n // 2) for n in (35, 6, 20)
    ]
    expected = []
    with lc.attach(model, config, maps) as handle:
        for number, (tokens, _) in enumerate(documents):
            nats = 0.0
            for stretch in stretches_of(number, tokens, 1, 16):
                ids = torch.tensor([stretch.ids[:-1]])
                logits = decoded(model, ids, torch.ones_like(ids), handle.new_cache())[0]
                scores = logits.log_softmax(1)[-stretch.scored :]
                wanted = torch.tensor(stretch.ids[-stretch.scored :])
                nats -= float(scores.gather(1, wanted.unsqueeze(1)).sum())
            expected.append(nats)
    settings = {"prefix": 1, "length": 16, "batch": batch, "progress": False}
    found = score_words(model, documents, Contestant("LESS", config, maps), **settings)
    assert found.nats == pytest.approx(expected, rel=1e-4)
    assert found.word_perplexity == pytest.approx(math.exp(sum(expected) / 30), rel=1e-3)
    assert found.token_perplexity == pytest.approx(math.exp(sum(expected) / 61), rel=1e-3)
    whole = score_words(model, documents, Contestant("full"), **settings)
    assert abs(whole.nats[0] - found.nats[0]) > 1


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="data: holds no tokens"):
        score_words(model_of("llama"), [([], 1)], Contestant("full"), prefix=1, length=8)


MARKED = (
    " = Some Title = \n \n The 3 @,@ 000 @-@ year @-@ old ' quoted ' words ( in brackets ) , it 's "
    '5 @.@ 5 ° warm : see [ 1 ] ; " so " . \n = = Part = = \n The boys \' N Sync .'
)


def test_wikitext_is_read_as_people_write_it():
    text = without_wikitext_marks(MARKED)
    assert "3,000-year-old 'quoted' words (in brackets)," in text
    assert 'see [1]; "so".' in text
    assert "== Part ==" in text
    assert count_words(" a  b\nc") == 4


def test_wikitext_is_read_as_lm_eval_does():
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    rough = MARKED + " ! ? , . : ; { a } [b ] ( c) = = = = x = = = y ° \n N 's s ' t \" u\" "
    for text in (MARKED, rough, rough * 3):
        assert without_wikitext_marks(text) == theirs.wikitext_detokenizer({"page": text})


def test_stretches_are_lm_evals():
    utils = pytest.importorskip("lm_eval.utils")
    importlib.import_module("lm_eval.utils")
    for count in (1, 5, 8, 9, 23):
        theirs = map(
            utils.make_disjoint_window,
            utils.get_rolling_token_windows([*range(count)], 99, 8, 1),
        )
        mine = stretches_of(0, [*range(count)], 99, 8)
        assert [([*context, *more][:-1], more) for context, more in theirs] == [
            (s.ids[:-1], s.ids[-s.scored :]) for s in mine
        ]
