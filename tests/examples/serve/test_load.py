"""Many requests at once: who waits, who is refused, who leaves, and that nobody is mixed up."""

import asyncio
import itertools
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from examples.serve.load import alone, make_prompts, settled, together
from tests.examples.serve.conftest import serving, slowed

PROMPT = "import os\nimport sys\n"


def test_answers_do_not_depend_on_who_else_asks(live):
    prompts = make_prompts(12)
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 3}

    def ask(i):
        return live.complete(prompts[i], **(sampled if i % 2 else {})).choices[0].text

    expected = [ask(i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, [*range(12)] * 2)) == expected * 2


def test_a_crowd_of_which_half_hangs_up(live):
    prompts = make_prompts(40)

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            expected = await alone(client, live.name, prompts, 12)
            assert len(set(expected)) > 35
            for _ in range(2):
                seen = await together(client, live.name, prompts, expected, 12)
                assert (seen.complete, seen.hung_up, seen.wrong) == (20, 20, 0)
        return await settled(live.url)

    stats = asyncio.run(run())
    assert stats["rows_running"] == stats["queue"] == 0


def test_one_request_too_many_is_told_to_come_back(model):
    with serving(slowed(model, 0.02), max_batch=1, max_choices=1, max_queue=2) as live:
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(live.complete, PROMPT, max_tokens=60)
            live.wait_until(lambda s: s.running == 1)
            others = [pool.submit(live.complete, PROMPT, max_tokens=2) for _ in range(2)]
            live.wait_until(lambda s: s.waiting == 2)
            with pytest.raises(openai.RateLimitError, match="2 prompts wait already") as caught:
                live.complete(PROMPT)
            assert caught.value.response.headers["retry-after"] == "1"
            assert [len(f.result().choices) for f in (first, *others)] == [1, 1, 1]
        with pytest.raises(openai.BadRequestError, match="prompt: got 3, at most 2"):
            live.complete([PROMPT] * 3)


def test_late_answers_are_ended(model):
    with serving(slowed(model, 0.05), max_batch=1, max_choices=1, request_timeout=0.6) as live:
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.6 s") as caught:
            live.complete(PROMPT, max_tokens=500)
        assert caught.value.status_code == 504
        stream = live.complete(PROMPT, max_tokens=500, stream=True)
        with pytest.raises(openai.APIError, match=r"longer than 0\.6 s"):
            list(stream)
        live.wait_until(lambda s: s.idle)


def test_late_while_still_waiting(model):
    """A stream of which nothing was sent yet has a status of its own, too."""
    slow = slowed(model, 0.6)
    limits = {"max_batch": 1, "max_choices": 1, "request_timeout": 0.5}
    with serving(slow, **limits) as live, ThreadPoolExecutor(2) as pool:
        first = pool.submit(live.complete, PROMPT, max_tokens=500, stream=True)
        live.wait_until(lambda s: s.waiting == 1)
        second = pool.submit(live.complete, PROMPT, max_tokens=500, stream=True)
        with pytest.raises(openai.InternalServerError, match="longer than") as caught:
            second.result()
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than"):
            list(first.result())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(model, stream):
    body = {"prompt": PROMPT, "max_tokens": 900, "stream": stream, "n": 2}
    with serving(slowed(model, 0.02), max_batch=2, max_choices=2) as live:
        for _ in range(2):
            with socket.create_connection(live.address) as connection:
                connection.sendall(raw_request({"model": live.name, **body}))
                live.wait_until(lambda s: s.running == 2)
            live.wait_until(lambda s: s.idle, seconds=2)
        cancelled = 'requests_total{outcome="cancelled"} 2.0'
        assert cancelled in httpx.get(live.url + "/metrics").text


def raw_request(body):
    data = json.dumps(body).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + data


def test_a_client_that_leaves_the_queue_is_forgotten(model):
    with serving(slowed(model, 0.02), max_batch=1, max_choices=1) as live:
        first = live.complete(PROMPT, max_tokens=900, stream=True)
        next(iter(first))
        impatient = live.client.with_options(timeout=0.2)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model=live.name, prompt=PROMPT)
        live.wait_until(lambda s: s.waiting == 0)
        assert live.service.scheduler.running == 1
        first.close()
        live.wait_until(lambda s: s.idle)


def test_a_long_prompt_does_not_hold_up_a_stream(model):
    slow = slowed(model, 0.005)
    with serving(slow, prefill_chunk=32) as live:
        stream = live.complete(PROMPT, max_tokens=300, stream=True)
        next(iter(stream))
        live.complete(list(range(1, 501)), max_tokens=1)
        stream.close()
    widths = [shape[1] for shape in slow.decoder.calls]
    chunks = [i for i, width in enumerate(widths) if width == 32]
    assert len(chunks) == 15
    # Between two chunks there is a step.
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(chunks))


def test_short_prompts_are_read_together(model):
    """Four of them fit into one turn's chunk: no step in between."""
    slow = slowed(model, 0.0)
    with serving(slow, prefill_chunk=64) as live:
        live.complete([[5] * 15] * 4, max_tokens=2)
    assert slow.decoder.calls == [(1, 15)] * 4 + [(4, 1)]


def test_long_texts_do_not_keep_short_ones_waiting(model, monkeypatch):
    """However many come: here the first is never done, unless the short one is answered."""
    done = threading.Event()
    slow = slowed(model, 0.0)
    slow._longest_token = None  # so that length alone is no reason to refuse it

    def encode(text):
        if len(text) > 100_000:
            assert done.wait(60)
        return model.encode(text[:50])

    monkeypatch.setattr(slow, "encode", encode, raising=False)
    with serving(slow) as live, ThreadPoolExecutor(60) as pool:
        long = [pool.submit(live.complete, "x" * 250_000, max_tokens=1) for _ in range(60)]
        quick = live.client.with_options(timeout=20)
        try:
            for _ in range(5):
                quick.completions.create(model=live.name, prompt=PROMPT, max_tokens=1)
        finally:
            done.set()
        assert all(answer.result(60).choices for answer in long)


def test_a_text_that_cannot_fit_is_not_even_looked_at(model, monkeypatch):
    quick = slowed(model, 0.0)
    monkeypatch.setattr(quick, "encode", lambda text: pytest.fail("it was"), raising=False)
    with serving(quick) as live:
        for ask in (live.complete, live.chat):
            with pytest.raises(openai.BadRequestError, match="the context of 1024") as caught:
                ask("x" * 60_000)
            assert caught.value.body["code"] == "context_length_exceeded"


def test_a_failing_step_is_told_and_survived(model):
    with serving(slowed(model, 0.0, fails_at=4)) as live:
        with pytest.raises(openai.InternalServerError, match="The model failed"):
            live.complete(PROMPT)
        assert live.complete(PROMPT).choices[0].finish_reason == "length"


def test_requests_start_no_threads(live):
    """Each thread that allocates keeps some memory: with one a request, it would not stay flat."""
    live.complete(PROMPT)
    before = {thread.name for thread in threading.enumerate()}
    with ThreadPoolExecutor(16, "client") as pool:
        list(pool.map(lambda _: live.complete(PROMPT, max_tokens=4), range(32)))
    after = {thread.name for thread in threading.enumerate()}
    # Those of an earlier test would hide new ones of their name.
    assert not [name for name in after if name.startswith("AnyIO")]
    started = after - before
    assert {name for name in started if not name.startswith(("client", "tokenizing"))} == set()
