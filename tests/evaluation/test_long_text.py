"""Key tokens and names of real text."""

import pytest
import torch

from less_cache import reference_model
from less_cache.evaluation.long_text import (
    Name,
    Reading,
    TextWindow,
    key_tokens,
    names_again,
    read,
    short_context_nats,
    told_apart,
    windows_with_names,
)
from less_cache.evaluation.perplexity import Contestant, Window, score
from tests.integrations.models import less, model_of, prompts

TEXT = "def width(first): return first + width\nclass Other: return width_of_it(first)\n"


def by_words(text):
    """Begin and end of letters, four at a time, and of anything else."""
    places, at = [], 0
    while at < len(text):
        step = 1
        while (
            step < 4 and text[at].isalpha() and at + step < len(text) and text[at + step].isalpha()
        ):
            step += 1
        places.append((at, at + step))
        at += step
    return places


def test_names_are_identifiers_that_come_again():
    places = by_words(TEXT)
    found = names_again(TEXT, places)
    told = [TEXT[places[name.start][0] : places[name.stop - 1][1]] for name in found]
    # `return` is a keyword; `width_of_it` is another name than `width`.
    assert told == ["first", "width", "first"]
    first = [i for i, (begin, _) in enumerate(places) if TEXT[begin:].startswith("first")]
    assert found[0] == Name(first[1], first[1] + 2, first[1] - first[0] - 2)
    # Distances are from the last time, not the first.
    assert found[2].distance == first[2] - first[1] - 2


def test_what_came_before_the_stretch_does_not_count():
    places = by_words(TEXT)
    half = next(i for i, (begin, _) in enumerate(places) if TEXT[begin:].startswith("class"))
    assert names_again(TEXT, places[half:]) == ()


def test_windows_are_spread_and_know_their_names():
    _, tokenizer = reference_model.load()
    documents = [(d.name, d.text) for d in reference_model.held_out_documents()[:4]]
    whole = windows_with_names(documents, tokenizer, 256)
    few = windows_with_names(documents, tokenizer, 256, 4)
    assert len({window.document for window in few}) > 1
    for window in few:
        assert any(torch.equal(window.ids, other.ids) for other in whole)
        for name in window.names:
            word = tokenizer.decode(window.ids[name.start : name.stop]).strip()
            before = tokenizer.decode(window.ids[: name.start])
            assert name.start - name.distance > 0
            assert any(part in before for part in (word, word.strip("().,:[]='\"*-")))
    with pytest.raises(ValueError, match="data: no document has length = 1000000 tokens"):
        windows_with_names(documents, tokenizer, 1_000_000)


def test_a_slow_tokenizer_is_told():
    def slow(text, **_):
        raise NotImplementedError

    with pytest.raises(ValueError, match="tokenizer does not tell where"):
        windows_with_names([("a", "text")], slow, 4)


@pytest.mark.parametrize("small", [False, True])
def test_readings_are_the_scores_of_perplexity(small):
    model = model_of("llama")
    ids, _ = prompts([17, 17, 17])
    entry = Contestant("LESS", *less(model)) if small else Contestant("full")
    scores = score(model, [Window("a", row) for row in ids], entry, progress=False)
    found = read(model, [*ids], entry, batch=2)
    for own, losses in zip(found, scores.losses, strict=True):
        torch.testing.assert_close(own.nats, losses)
    if not small:
        likeliest = model(ids).logits[:, :-1].argmax(2)
        assert torch.equal(torch.stack([own.hits for own in found]), likeliest == ids[:, 1:])


@pytest.mark.parametrize("length", [3, 8, 9, 17])
def test_short_contexts_are_short(length):
    model = model_of("llama")
    ids, _ = prompts([length])
    (found,) = short_context_nats(model, [*ids], 8, batch=2)
    for token in range(1, length):
        # From the last multiple of four that leaves at least four before it.
        start = max(0, (token - 4) // 4 * 4)
        logits = model(ids[:, start:token]).logits[0, -1].detach()
        nats = -logits.log_softmax(0)[ids[0, token]]
        assert float(found[token - 1]) == pytest.approx(float(nats), rel=1e-4)


def test_key_tokens_are_foreseen_with_the_whole_context_alone():
    full = Reading(torch.tensor([0.1, 0.1, 2.5, 1.9]), torch.ones(4, dtype=torch.bool))
    short = torch.tensor([3.0, 1.5, 9.0, 4.0])
    assert key_tokens([full], [short])[0].tolist() == [True, False, False, True]


def test_figures_are_means_over_their_tokens():
    nats = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    hits = torch.tensor([False, True, False, True, True])
    window = TextWindow("a", torch.arange(6), (Name(1, 3, 10), Name(3, 6, 300), Name(5, 6, 70)))
    keys = torch.tensor([True, False, False, False, True])
    told = told_apart([window], [Reading(nats, hits)], [keys])
    assert (told["tokens"], told["nats"]) == (5, 3.0)
    assert (told["key_tokens"], told["key_nats"], told["other_nats"]) == (2, 3.0, 3.0)
    # One document has none to draw.
    assert told["nats_interval"] is None
    near, middle, far = (
        {key: value for key, value in own.items() if "interval" not in key}
        for own in told["names"].values()
    )
    # The first token of a name says which is meant; completed are those whose others follow.
    assert near == {"names": 1, "nats": 1.5, "several_tokens": 1, "completed": 1.0}
    assert middle == {"names": 1, "nats": 5.0, "several_tokens": 0, "completed": None}
    assert far == {"names": 1, "nats": 4.0, "several_tokens": 1, "completed": 1.0}
    assert [*told["names"]] == ["under 64", "64 to 255", "256 and more"]
    hits[4] = False
    told = told_apart([window], [Reading(nats, hits)], [keys & False])
    assert told["names"]["256 and more"]["completed"] == 0.0
    assert told["key_nats"] is None


def test_intervals_draw_documents():
    def told(*means):
        windows = [TextWindow(name, torch.arange(5), ()) for name in ("a", "b", "b")]
        readings = [Reading(torch.full((4,), m), torch.ones(4, dtype=torch.bool)) for m in means]
        keys = [torch.tensor([True, False, False, False])] * 3
        return told_apart(windows, readings, keys)

    same = told(2.0, 2.0, 2.0)
    assert same["nats_interval"] == same["key_nats_interval"] == (2.0, 2.0)
    low, high = told(1.0, 4.0, 4.0)["other_nats_interval"]
    # Of two documents, the one or the other is often drawn twice.
    assert (low, high) == (1.0, 4.0)
    assert same["names"]["under 64"]["nats_interval"] is None
