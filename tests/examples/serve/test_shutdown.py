"""The real process: it starts with one command, and a signal stops it in order."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from examples.serve.__main__ import main
from examples.serve.model import SHIPPED


@pytest.fixture
def process(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.serve", "--model", str(folder), "--name", SHIPPED]
    started = subprocess.Popen(
        [*command, "--port", str(port), "--shutdown-grace", "1.5", "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    while True:
        try:
            httpx.get(url + "/healthz")
            break
        except httpx.TransportError:
            assert started.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
    yield started, url
    started.kill()
    started.wait(10)


def test_sigterm_refuses_new_requests_finishes_old_ones_and_ends_late_ones(process):
    running, url = process
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    ask = {"model": SHIPPED, "prompt": "import os\n", "stream": True, "temperature": 0}
    short = client.completions.create(max_tokens=60, **ask)
    # Too much for the grace: eight answers a prompt, eight times, as long as they may be.
    late = client.completions.create(
        max_tokens=1000, n=8, **{**ask, "prompt": ["import os\n"] * 8, "stream": True}
    )
    next(iter(late))
    running.send_signal(signal.SIGTERM)
    until = time.monotonic() + 5
    while httpx.get(url + "/healthz").status_code == 200:
        assert time.monotonic() < until
    refused = httpx.post(url + "/v1/completions", json={**ask, "stream": False})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert "retry-after" in refused.headers
    chunks = list(short)
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="The server stopped"):
        list(late)
    assert running.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, "max_batch: got 0, expected an integer >= 1"),
        ({"request_timeout": 0.0}, "request_timeout: got 0.0, expected a number > 0"),
        ({"api_key": " "}, "api_key: got nothing but blanks"),
    ],
)
def test_limits_are_checked_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(**arguments)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; less-cache export onnx writes it"):
        main(model=tmp_path)
