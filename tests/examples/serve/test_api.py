"""What OpenAI's own client gets: answers, streams, and errors."""

import httpx
import numpy as np
import openai
import pytest

from examples.serve.errors import ApiError
from tests.examples.serve.conftest import serving

PROMPT = 'def read_lines(path):\n    """Return the lines of a file.'


def greedy(model, ids, count):
    """The decoder's own loop, without a server."""
    return model.decoder.generate(np.array([ids]), max_new_tokens=count, stop_tokens=[])[0].tolist()


def test_a_completion_is_what_the_decoder_gives(live, model):
    ids = model.encode(PROMPT)
    answer = live.complete(PROMPT)
    assert answer.choices[0].text == model.tokenizer.decode(greedy(model, ids, 24))
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == live.name
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 24)
    assert usage.total_tokens == len(ids) + 24
    assert live.complete(ids).choices[0].text == answer.choices[0].text


def test_the_default_length_is_the_apis(live):
    answer = live.client.completions.create(model=live.name, prompt=PROMPT)
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_is_the_whole_in_parts(live, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(live.complete(PROMPT, stream=True, **options))
    whole = live.complete(PROMPT)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert set(reasons[:-1]) <= {None}
    assert reasons[-1] == "length"
    assert (chunks[-1].usage == whole.usage) == usage
    assert len({c.id for c in chunks}) == 1


def test_usage_in_every_chunk(live):
    extra = {"stream_options": {"continuous_usage_stats": True}}
    counts = [c.usage.completion_tokens for c in live.complete(PROMPT, stream=True, **extra)]
    assert counts == sorted(counts)
    assert counts[-1] == 24


def test_chat_without_a_template_goes_on_with_the_text(live):
    whole = live.chat(PROMPT)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == live.complete(PROMPT).choices[0].text
    chunks = list(live.chat(PROMPT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    parts = [{"type": "text", "text": PROMPT[:9]}, {"type": "text", "text": PROMPT[9:]}]
    assert live.chat(parts).choices[0].message.content == text


def test_messages_are_joined_by_an_empty_line(live):
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "x = 1"}]
    found = live.client.chat.completions.create(
        model=live.name, messages=messages, max_completion_tokens=5, temperature=0
    )
    wanted = live.complete("import os\n\nx = 1", max_tokens=5)
    assert found.choices[0].message.content == wanted.choices[0].text
    assert found.usage == wanted.usage


def test_choices_and_prompts_have_their_own_indices(live):
    prompts = [PROMPT, "import os"]
    arguments = {"n": 3, "temperature": 1.0, "seed": 7}
    answer = live.complete(prompts, **arguments)
    assert [c.index for c in answer.choices] == list(range(6))
    texts = [c.text for c in answer.choices]
    assert len(set(texts)) == 6
    assert [c.text for c in live.complete(prompts, **arguments).choices] == texts
    streamed = [""] * 6
    for chunk in live.complete(prompts, stream=True, **arguments):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    alone = live.complete(PROMPT, n=1, temperature=1.0, seed=8)
    assert alone.choices[0].text == texts[1]


def test_penalties_change_what_repeats(live):
    plain = live.complete(PROMPT, max_tokens=80).choices[0].text
    penalised = live.complete(PROMPT, max_tokens=80, frequency_penalty=1.5).choices[0].text
    assert len(set(penalised.split())) > len(set(plain.split()))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", [3, 20, 41])
def test_stop_strings_end_an_answer_and_do_not_show(live, where, stream):
    whole = live.complete(PROMPT, max_tokens=40).choices[0].text
    stop = whole[where : where + 6]
    answer = live.complete(PROMPT, max_tokens=40, stop=[stop, "never there"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
    else:
        text, reason = answer.choices[0].text, answer.choices[0]
    assert text == whole[: whole.index(stop)]
    assert reason.finish_reason == "stop"


def test_models(live):
    assert [m.id for m in live.client.models.list()] == [live.name]
    assert live.client.models.retrieve(live.name).id == live.name
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("another")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt-9"}, "model: got 'gpt-9', this server has only"),
        ({"logit_bias": {"1": 2}}, "logit_bias: this server does not support it"),
        ({"logprobs": 21}, "logprobs: got 21"),
        ({"logprobs": True}, "logprobs: got True"),
        ({"extra_body": {"top_k": -2}}, "top_k: got -2"),
        ({"extra_body": {"min_p": 1.5}}, "min_p: got 1.5"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs: this server does not support it"),
        ({"temperature": 3}, "temperature: got 3"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 5000}, "max_tokens: got 5000, at most 1024"),
        ({"max_tokens": 1020}, "prompt: 16 tokens and 1020 new ones are more than .* 1024"),
        ({"prompt": "x" * 50_000}, "prompt: got a text of 50,000 characters; the context of 1024"),
        ({"prompt": " x" * 5_000}, "prompt: 5000 tokens and 16 new ones"),
        ({"n": 9}, "n: got 9, at most 8"),
        ({"n": True}, "n: got True"),
        ({"stop": ["a"] * 5}, "stop: got"),
        ({"stop": ""}, "stop.0: got ''"),
        ({"prompt": ""}, "prompt: got no tokens"),
        ({"prompt": [[1], []]}, "prompt: got .*expected a text, token ids"),
        ({"prompt": ["a", 1]}, "prompt: got"),
        ({"prompt": [5000]}, "prompt: got token 5000, expected 0 to 4095"),
        ({"stream_options": {"include_usage": True}}, "stream_options is only for"),
    ],
)
def test_what_is_wrong_or_not_supported_is_named(live, arguments, message):
    request = {"model": live.name, "prompt": PROMPT, **arguments}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=message) as caught:
        live.client.completions.create(**request)
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


def test_parameters_that_ask_for_nothing_pass(live):
    asks = {"logit_bias": {}, "echo": False, "best_of": 1, "suffix": None, "user": "me"}
    assert live.complete(PROMPT, max_tokens=1, **asks).choices


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "not valid JSON"),
        ("POST", "/v1/completions", b"[]", 400, "got"),
        ("POST", "/v1/completions", b'{"model": "m"}', 400, "prompt: missing"),
        ("POST", "/v1/completions", b" " * 300_000, 413, "more than 262,144 bytes"),
        ("GET", "/v1/completions", b"", 405, "Method Not Allowed"),
        ("GET", "/nothing", b"", 404, "Not Found"),
    ],
)
def test_other_mistakes_have_the_apis_shape_too(live, method, path, body, status, message):
    headers = {"Content-Type": "application/json"}
    answer = httpx.request(method, live.url + path, content=body, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_a_key_is_asked_for(model):
    with serving(model, api_key="secret") as live:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            live.complete(PROMPT)
        right = live.client.with_options(api_key="secret")
        assert right.models.list().data
        assert httpx.get(live.url + "/healthz").json() == {"status": "ok"}


def test_metrics_count(model):
    with serving(model, max_batch=4, max_choices=4) as live:
        live.complete(PROMPT, n=2, max_tokens=10)
        with pytest.raises(openai.BadRequestError):
            live.complete("")
        text = httpx.get(live.url + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    prefix = "less_cache_"
    assert float(values[prefix + 'requests_total{outcome="completed"}']) == 1
    assert float(values[prefix + 'requests_total{outcome="invalid"}']) == 1
    assert float(values[prefix + "prompt_tokens_total"]) == len(model.encode(PROMPT))
    assert float(values[prefix + "generated_tokens_total"]) == 20
    assert float(values[prefix + "step_seconds_count"]) == 9
    assert float(values[prefix + "time_to_first_token_seconds_count"]) == 1
    assert float(values[prefix + "rows_running"]) == 0
    assert float(values[prefix + "cache_row_bytes"]) == model.bytes_per_row
    assert float(values[prefix + "cache_allocated_bytes"]) == 4 * model.bytes_per_row


def test_errors_tell_programs_what_to_do():
    busy = ApiError(429, "later", retry_after=1)
    assert busy.headers == {"Retry-After": "1"}
    assert busy.body()["error"]["type"] == "rate_limit_error"
