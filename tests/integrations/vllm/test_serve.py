"""``vllm serve`` with the plugin, asked by many clients at once, half of which hang up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integrations.vllm.engines import CACHE, ENGINE, expected, prompts_of

pytest.importorskip("vllm", reason="needs vLLM: make vllm sets up an environment with it")
openai = pytest.importorskip("openai")

ROOT = Path(__file__).parents[3]
STREAMS, REQUESTS, TOKENS = 32, 500, 12


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(port, less):
    """``vllm serve`` of the reference model."""
    flags = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "reference",
        "additional-config": json.dumps({"less_cache": less}),
        **{name.replace("_", "-"): value for name, value in ENGINE.items() if name != "model"},
        "max-num-seqs": STREAMS,
    }
    eager = flags.pop("enforce-eager")
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    program = Path(sys.executable).with_name("vllm")
    return [str(program), "serve", ENGINE["model"], *words, *(["--enforce-eager"] if eager else [])]


def environment():
    found = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    return found | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextmanager
def server(less, log):
    """Its address, when it is ready."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as told:
        process = subprocess.Popen(
            command(port, less), stdout=told, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT
        )
        try:
            deadline = time.monotonic() + 200
            while not answers_health(address):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def answers_health(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as found:
            return found.status == 200
    except (urllib.error.URLError, OSError):
        return False


def gauge(address, name):
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as found:
        text = found.read().decode()
    return float(re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])


async def ask(client, number, prompt):
    """The tokens of one answer; of odd numbers ``None``: they hang up after some."""
    stream = await client.completions.create(
        model="reference",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    found = []
    async for piece in stream:
        found += piece.choices[0].token_ids or []
        if number % 2 and len(found) >= 1 + number % 7:
            await stream.close()
            return None
    return found


async def crowd(address, prompts):
    """What all requests got, so many at a time."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=200)
    turn = asyncio.Semaphore(STREAMS)

    async def one(number):
        async with turn:
            return await ask(client, number, prompts[number % len(prompts)])

    async with client:
        return await asyncio.gather(*(one(number) for number in range(REQUESTS)))


def test_many_clients_half_of_which_hang_up(tmp_path):
    prompts = prompts_of((1, 9, 30, 60, 90))
    wanted = expected(prompts, TOKENS)
    with server(CACHE, tmp_path / "log") as address:
        found = asyncio.run(crowd(address, prompts))
        deadline = time.monotonic() + 20
        while gauge(address, "num_requests_running") and time.monotonic() < deadline:
            time.sleep(0.2)
        left = [
            gauge(address, name)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        ]
    assert left == [0, 0, 0]
    assert all(found[i] is None for i in range(1, REQUESTS, 2))
    assert all(found[i] == wanted[i % len(prompts)] for i in range(0, REQUESTS, 2))


def test_a_missing_folder_ends_the_server_before_it_serves(tmp_path):
    done = subprocess.run(
        command(free_port(), {**CACHE, "maps": str(tmp_path / "missing")}),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    assert re.search("less_cache: .*missing", done.stdout + done.stderr)


def test_broken_json_ends_it_too():
    given = command(free_port(), CACHE)
    given[given.index("--additional-config") + 1] = '{"less_cache": {"capacity": 52}'
    done = subprocess.run(
        given, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=200, check=False
    )
    assert done.returncode != 0
    assert "additional-config" in done.stderr
