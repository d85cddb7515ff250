"""The shipped model, exported once a session, and servers of it in threads."""

import contextlib
import copy
import socket
import threading
import time

import pytest

for package in ("fastapi", "uvicorn", "openai", "prometheus_client", "onnx", "onnxscript"):
    pytest.importorskip(package)

import openai  # noqa: E402

from examples.serve.app import Service  # noqa: E402
from examples.serve.model import SHIPPED, ServedModel, export_shipped  # noqa: E402
from examples.serve.server import Server  # noqa: E402
from examples.serve.settings import Settings  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    export_shipped(path)
    return path


@pytest.fixture(scope="session")
def model(folder):
    return ServedModel(folder, name=SHIPPED, threads=1)


class Decoder:
    """A decoder that waits at every call and notes how many rows and tokens it was given."""

    def __init__(self, decoder, delay=0.0, fails_at=None):
        self.inner, self.delay, self.fails_at = decoder, delay, fails_at
        self.calls = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def append(self, state, input_ids, attention_mask=None):
        self.calls.append(input_ids.shape)
        if len(self.calls) == self.fails_at:
            raise RuntimeError("as the test wants it")
        time.sleep(self.delay)
        return self.inner.append(state, input_ids, attention_mask)


def slowed(model, delay, **options):
    """The same model, with at least `delay` seconds a step."""
    changed = copy.copy(model)
    changed.decoder = Decoder(model.decoder, delay, **options)
    return changed


class Live:
    """A running server and a client of it."""

    def __init__(self, service, port):
        self.service, self.name = service, SHIPPED
        self.address, self.url = ("127.0.0.1", port), f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def complete(self, prompt, **arguments):
        arguments = {"temperature": 0, "max_tokens": 24, **arguments}
        return self.client.completions.create(model=self.name, prompt=prompt, **arguments)

    def chat(self, text, **arguments):
        arguments = {"temperature": 0, "max_tokens": 24, **arguments}
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=self.name, messages=messages, **arguments)

    def wait_until(self, condition, seconds=5.0):
        until = time.monotonic() + seconds
        while not condition(self.service.scheduler):
            assert time.monotonic() < until, self.service.stats()
            time.sleep(0.01)


@contextlib.contextmanager
def serving(model, **settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(model, Settings(**settings))
    server = Server(service, "127.0.0.1", port)
    thread = threading.Thread(target=server.run)
    thread.start()
    live = Live(service, port)
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield live
    finally:
        live.client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(model):
    with serving(model) as running:
        yield running
