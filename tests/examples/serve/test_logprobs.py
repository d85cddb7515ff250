"""Log probabilities, of prompts too: in the API's format, and those of decoding token by token."""

import math
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

import httpx
import numpy as np
import openai
import pytest

from examples.serve.logprobs import LEAST, Scorer
from less_cache import reference_model
from tests.examples.serve.conftest import serving, slowed

PROMPT = 'def read_lines(path):\n    """Return the lines of a file.'
LONG = reference_model.held_out_documents()[0].text[500:1400]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def one_by_one(model, ids):
    """What the small cache says of each token but the first, fed one at a time."""
    state = model.decoder.new_state(1)
    rows = [log_softmax(model.decoder.append(state, np.array([[i]]))[0]) for i in ids]
    return np.array([row[token] for row, token in zip(rows, ids[1:], strict=False)]), rows


def evaluated(choice, start):
    """As lm-eval's `local-completions` reads a choice: a continuation's sum, and whether greedy."""
    logprobs = choice["logprobs"]["token_logprobs"][start:-1]
    top = choice["logprobs"]["top_logprobs"][start:-1]
    greedy = all(one == max(best.values()) for one, best in zip(logprobs, top, strict=True))
    return sum(logprobs), greedy


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_scored_prompt_is_decoded_token_by_token(live, model, max_tokens, as_ids):
    ids = model.encode(LONG)
    assert len(ids) > 4 * model.decoder.manifest.config.capacities[0][0]
    wanted, rows = one_by_one(model, ids)
    answer = live.complete(
        ids if as_ids else LONG, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
    )
    choice, told = answer.choices[0], answer.choices[0].logprobs
    assert len(told.tokens) == len(ids) + max_tokens
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1 : len(ids)], wanted, atol=2e-4)
    best = [max(top.values()) for top in told.top_logprobs[1 : len(ids)]]
    np.testing.assert_allclose(best, [row.max() for row in rows[:-1]], atol=2e-4)
    assert choice.text.startswith(LONG)
    assert "".join(told.tokens) == choice.text
    lengths = [len(token) for token in told.tokens]
    assert told.text_offset == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == max_tokens
    assert choice.finish_reason == "length"
    # A pass in which nothing is evicted would say something else.
    state = model.decoder.new_state(1)
    whole = log_softmax(model.decoder.append(state, np.array([ids]))[0])
    assert np.abs(whole - rows[-1]).max() > 0.01


def test_a_harness_gets_the_sum_of_a_continuation(live, model):
    """Its own requests: lists of token ids, one token more than is asked for."""
    greedy = live.complete(PROMPT, max_tokens=8).choices[0].text
    pairs = [(PROMPT, greedy), (PROMPT, " a banana"), ("import os\n", "import sys\n")]
    ids = [(model.encode(a), model.encode(a + b)) for a, b in pairs]
    body = {
        "model": live.name,
        "prompt": [whole for _, whole in ids],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = httpx.post(live.url + "/v1/completions", json=body, timeout=60).json()
    for choice, (context, whole) in zip(
        sorted(found["choices"], key=itemgetter("index")), ids, strict=True
    ):
        assert len(choice["logprobs"]["tokens"]) == len(whole) + 1
        logprob, is_greedy = evaluated(choice, len(context))
        wanted, rows = one_by_one(model, whole)
        assert logprob == pytest.approx(wanted[len(context) - 1 :].sum(), abs=1e-3)
        best = [int(row.argmax()) for row in rows[len(context) - 1 : -1]]
        assert is_greedy == (best == whole[len(context) :])


def test_scores_do_not_depend_on_who_else_is_there(live):
    ask = {"echo": True, "logprobs": 3, "max_tokens": 4}
    alone = [live.complete(LONG[: 90 * i], **ask).choices[0] for i in range(1, 7)]
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda i: live.complete(LONG[: 90 * i], **ask).choices[0], range(1, 7))
        assert list(together) == alone


def test_an_answer_is_scored_without_its_prompt(live, model):
    plain = live.complete(PROMPT, max_tokens=10)
    answer = live.complete(PROMPT, max_tokens=10, logprobs=2)
    told = answer.choices[0].logprobs
    assert answer.choices[0].text == plain.choices[0].text == "".join(told.tokens)
    assert told.text_offset[0] == 0
    state = model.decoder.new_state(1)
    first = log_softmax(model.decoder.append(state, np.array([model.encode(PROMPT)]))[0])
    assert told.token_logprobs[0] == pytest.approx(first.max(), abs=1e-4)
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2


def test_zero_likeliest_still_score_the_taken_one(live):
    told = live.complete(PROMPT, max_tokens=3, logprobs=0).choices[0].logprobs
    assert [list(top) for top in told.top_logprobs] == [[token] for token in told.tokens]
    assert live.complete(PROMPT, max_tokens=3).choices[0].logprobs is None


def test_scores_are_the_models_own_whatever_chooses(live):
    """Neither temperature nor penalties nor a cut of the likeliest change them."""
    options = {"temperature": 1.5, "seed": 4, "top_p": 0.9, "frequency_penalty": 1.0}
    told = live.complete(PROMPT, max_tokens=6, logprobs=20, **options).choices[0]
    again = live.complete(PROMPT + told.text, max_tokens=0, logprobs=20, echo=True).choices[0]
    ids = len(told.logprobs.tokens)
    # Up to the cache's evictions, of which the prompt's chunk has none.
    np.testing.assert_allclose(
        again.logprobs.token_logprobs[-ids:], told.logprobs.token_logprobs, atol=1e-3
    )


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_a_stream_is_the_whole_in_parts(live, logprobs, max_tokens):
    options = {} if logprobs is None else {"logprobs": logprobs}
    ask = {"prompt": [PROMPT, "import"], "echo": True, "max_tokens": max_tokens, **options}
    whole = live.complete(**ask)
    for choice in whole.choices:
        parts = [c.choices[0] for c in live.complete(stream=True, **ask)]
        parts = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [x for part in parts if part.logprobs for x in getattr(part.logprobs, name)]
            assert told == (getattr(choice.logprobs, name) if logprobs else [])


def test_echo_alone_reads_the_prompt_as_ever(live):
    plain = live.complete(LONG, max_tokens=12).choices[0].text
    assert live.complete(LONG, max_tokens=12, echo=True).choices[0].text == LONG + plain
    assert live.complete(LONG, max_tokens=0, echo=True).choices[0].text == LONG


def test_a_prompt_of_one_token(live):
    told = live.complete([5], max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert told.token_logprobs == [None]
    told = live.complete([5], max_tokens=2, echo=True, logprobs=1, n=2).choices[1].logprobs
    assert [type(one) for one in told.token_logprobs] == [type(None), float, float]


def test_stop_strings_do_not_look_at_the_prompt(live):
    answer = live.complete(PROMPT, echo=True, logprobs=1, stop=["lines"], max_tokens=4)
    assert answer.choices[0].text.startswith(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_has_a_format_of_its_own(live, stream):
    whole = live.chat(PROMPT, max_tokens=6, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in whole]
        text = "".join(choice.delta.content or "" for choice in choices)
        content = [x for choice in choices if choice.logprobs for x in choice.logprobs.content]
    else:
        text = whole.choices[0].message.content
        content = whole.choices[0].logprobs.content
    assert "".join(one.token for one in content) == text
    wanted = live.complete(PROMPT, max_tokens=6, logprobs=3).choices[0].logprobs
    assert [one.logprob for one in content] == wanted.token_logprobs
    for one in content:
        assert bytes(one.bytes).decode() == one.token
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob


def test_chat_scores_without_likeliest(live):
    content = live.chat(PROMPT, max_tokens=2, logprobs=True).choices[0].logprobs.content
    assert [one.top_logprobs for one in content] == [[], []]
    assert live.chat(PROMPT, max_tokens=2).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("chat", "arguments", "message"),
    [
        (False, {"max_tokens": 0}, "max_tokens: got 0, expected at least 1; 0 is for echo"),
        (False, {"max_tokens": -1}, "max_tokens: got -1"),
        (False, {"logprobs": 21}, "logprobs: got 21"),
        (True, {"top_logprobs": 2}, "top_logprobs is only for logprobs"),
        (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs: got 21"),
        (True, {"logprobs": 1}, "logprobs: got 1"),
        (True, {"extra_body": {"echo": True}}, "echo: this server does not support it"),
        (True, {"max_tokens": 0}, "max_tokens: got 0"),
    ],
)
def test_what_does_not_go_together_is_named(live, chat, arguments, message):
    with pytest.raises(openai.BadRequestError, match=message):
        (live.chat if chat else live.complete)(PROMPT, **arguments)


def test_top_k_and_min_p_are_each_requests_own(live):
    sampled = {"temperature": 2.0, "seed": 3, "max_tokens": 20}
    greedy = live.complete(PROMPT, max_tokens=20).choices[0].text
    texts = {
        name: live.complete(PROMPT, extra_body=extra, **sampled).choices[0].text
        for name, extra in {
            "free": {},
            "off": {"top_k": -1, "min_p": 0},
            "zero": {"top_k": 0},
            "one": {"top_k": 1},
            "sure": {"min_p": 1.0},
        }.items()
    }
    assert texts["one"] == texts["sure"] == greedy != texts["free"]
    assert texts["free"] == texts["off"] == texts["zero"]
    chat = live.chat(PROMPT, extra_body={"top_k": 1}, **sampled).choices[0].message.content
    assert chat == greedy


def test_a_tiny_temperature_is_greedy(live):
    wanted = live.complete(PROMPT, temperature=0).choices[0].text
    assert live.complete(PROMPT, temperature=1e-308).choices[0].text == wanted


def test_forced_tokens_count_as_the_prompts(model):
    with serving(slowed(model, 0.0)) as live:
        ids = model.encode(PROMPT)
        live.complete(PROMPT, echo=True, logprobs=1, max_tokens=2)
        text = httpx.get(live.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["less_cache_prompt_tokens_total"]) == len(ids)
    assert float(values["less_cache_generated_tokens_total"]) == 2


class Alphabet:
    """A tokenizer whose token 2 is half a character, and which has no token 3."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join("ab\ufffd"[i : i + 1] for i in ids)

    def id_to_token(self, number):
        return [*"ab", "Ã"][number] if number < 3 else None


def test_tokens_that_are_no_text_have_a_name():
    scorer = Scorer(Alphabet(), 4)
    scored = scorer.score(2, np.array([0.0, 1.0, 3.0, -np.inf], np.float32), 7)
    assert [token.text for token, _ in scored.top] == ["Ã", "b", "a", "token_id:3"]
    assert [token.whole for token, _ in scored.top] == [False, True, True, False]
    assert scored.top[-1][1] == LEAST
    assert sum(math.exp(logprob) for _, logprob in scored.top) == pytest.approx(1)
    assert (scored.token.text, scored.logprob, scored.offset) == ("Ã", scored.top[0][1], 7)
