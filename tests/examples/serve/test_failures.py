"""What fails in the decoding thread: one request, one step, or all of it."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from examples.serve import server
from examples.serve.model import SHIPPED
from examples.serve.sequences import Answer, Generation
from tests.examples.serve.conftest import serving, slowed

PROMPT = "import os\nimport sys\n"
POISON = 77
"""A seed by which a test knows the answer that is to fail."""


def poisoned(monkeypatch, error, tokens=5, seed=POISON):
    """Let the answers with a seed fail after some tokens."""
    advance = Answer.advance

    def failing(self, logits):
        if self._generation.seed == seed and self.tokens == tokens:
            raise error
        return advance(self, logits)

    monkeypatch.setattr(Answer, "advance", failing)


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_row_that_fails_ends_only_its_own_request(model, monkeypatch, tokens):
    with serving(slowed(model, 0.01), max_batch=8) as live, ThreadPoolExecutor(7) as pool:
        expected = live.complete(PROMPT).choices[0].text
        poisoned(monkeypatch, RuntimeError("as the test wants it"), tokens)
        seeds = [*range(1, 4), POISON, *range(4, 7)]
        asked = [pool.submit(live.complete, PROMPT, seed=seed) for seed in seeds]
        for seed, answer in zip(seeds, asked, strict=True):
            if seed == POISON:
                with pytest.raises(openai.InternalServerError, match="The model failed"):
                    answer.result(30)
            else:
                assert answer.result(30).choices[0].text == expected
        assert live.complete(PROMPT).choices[0].text == expected
        assert live.service.scheduler.idle


def test_a_request_of_many_rows_fails_once_and_frees_them_all(model, monkeypatch):
    poisoned(monkeypatch, RuntimeError("as the test wants it"))
    with serving(slowed(model, 0.01), max_batch=4, max_choices=2) as live:
        other = live.complete(PROMPT, stream=True, max_tokens=60)
        next(iter(other))
        with pytest.raises(openai.InternalServerError):
            live.complete([PROMPT] * 4, n=2, seed=POISON)
        assert list(other)[-1].choices[0].finish_reason == "length"
        live.wait_until(lambda s: s.idle)
        counted = httpx.get(live.url + "/metrics").text
    assert 'requests_total{outcome="error"} 1.0' in counted
    assert 'outcome="invalid"' not in counted


def test_a_prompt_that_fails_ends_only_its_own_request(model):
    slow = slowed(model, 0.01)
    append = slow.decoder.append

    def failing(state, input_ids, attention_mask=None):
        if np.asarray(input_ids)[0, 0] == POISON:
            raise RuntimeError("as the test wants it")
        return append(state, input_ids, attention_mask)

    slow.decoder.append = failing
    with serving(slow) as live:
        stream = live.complete(PROMPT, max_tokens=60, stream=True)
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="The model failed"):
            live.complete([[1, 2], [POISON, 1], [3, 4]])
        assert list(stream)[-1].choices[0].finish_reason == "length"
        live.wait_until(lambda s: s.idle)


def test_logits_that_are_no_numbers_are_an_error(model):
    answer = Answer(0, [1], Generation(max_tokens=1), model.tokenizer, ())
    with pytest.raises(ValueError, match="logits: the greatest is nan"):
        answer.advance(np.array([0.0, np.nan], np.float32))


def test_a_dead_scheduler_tells_everybody(model, monkeypatch):
    """What is no Exception ends the thread: nobody may wait for it, and probes must see it."""
    monkeypatch.setattr(server, "DEAD_SECONDS", 1000.0)
    poisoned(monkeypatch, SystemExit(1), tokens=60, seed=None)
    with serving(slowed(model, 0.02), max_batch=2, max_choices=2) as live:
        with ThreadPoolExecutor(8) as pool:
            # Some run, some wait for a row.
            asked = [pool.submit(live.complete, PROMPT, max_tokens=500) for _ in range(6)]
            live.wait_until(lambda s: s.running == 2 and s.waiting == 4)
            for answer in asked:
                with pytest.raises(openai.InternalServerError, match="The model failed"):
                    answer.result(60)
        for path in ("/health", "/healthz"):
            answer = httpx.get(live.url + path)
            assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        with pytest.raises(openai.InternalServerError, match="The server has failed") as caught:
            live.complete(PROMPT)
        assert caught.value.status_code == 503
        assert caught.value.body["code"] == "server_failed"
        assert httpx.get(live.url + "/stats").json()["queue"] == 0


FAILING = """
import sys
from examples.serve import batch, server
from examples.serve.__main__ import main

def fail(self, tokens):
    raise SystemExit("as the test wants it")

batch.RowBatch.step = fail
server.DEAD_SECONDS = 0.5
main(model=__import__("pathlib").Path(sys.argv[1]), name=sys.argv[2], port=int(sys.argv[3]))
"""


def test_a_dead_scheduler_ends_the_process_with_an_error(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, str(folder), SHIPPED, str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 60
        while True:
            try:
                httpx.get(url + "/healthz")
                break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        body = json.dumps({"model": SHIPPED, "prompt": PROMPT})
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(url + "/v1/completions", content=body, headers=headers, timeout=30)
        assert answer.status_code == 500
        _, log = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "The scheduler's thread failed" in log
    finally:
        process.kill()
        process.wait(10)
