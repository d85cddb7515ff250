"""Requests with anything in them: an answer of the API's shape, and a server that lives on.

A toy stands in for the exported model: a sequence's next token depends on all of its tokens.
"""

import contextlib
import json
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from starlette.testclient import TestClient

import less_cache as lc
from examples.serve.app import Service, create_app
from examples.serve.model import ServedModel
from examples.serve.settings import Settings
from exporters.common.manifest import Manifest, TensorSpec
from exporters.onnx.placement import Placement
from exporters.onnx.state import OnnxState, empty_state
from less_cache import reference_model

EXAMPLES = 80
VOCABULARY = 4096
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Toy:
    """What the server asks of an `OnnxDecoder`."""

    def __init__(self, folder, **_):
        self.placement = Placement()
        config = lc.CacheConfig(1, 1, 1, 4, 8, lc.H2O(), rank=0, max_positions=64)
        specs = (TensorSpec("length", "int32", ()), TensorSpec("sum", "int64", ()))
        layers = [{"window": 0, "runs": []}]
        self.manifest = Manifest(
            folder,
            config,
            specs,
            VOCABULARY,
            (0,),
            {"layers": layers, "bytes_per_sequence": 12, "files": {}},
        )

    def new_state(self, batch):
        return empty_state(self.manifest, self.placement, batch)

    def append(self, state: OnnxState, ids, mask=None):
        mask = np.ones_like(ids) if mask is None else mask
        total, length = state.arrays["sum"].numpy().copy(), state.arrays["length"].numpy().copy()
        for column in range(ids.shape[1]):
            taken = (total * 31 + ids[:, column] + 7) % 1_000_003
            total = np.where(mask[:, column], taken, total)
        length = (length + mask.sum(1)).astype(np.int32)
        state.arrays["sum"] = self.placement.put(total)
        state.arrays["length"] = self.placement.put(length)
        tokens = np.arange(VOCABULARY)
        return np.sin(total[:, None] * 0.37 + tokens * 1.7).astype(np.float32) * 4


@pytest.fixture(scope="module")
def client():
    folder = Path(reference_model.__file__).parent / "model"
    with mock.patch("examples.serve.model.OnnxDecoder", Toy):
        model = ServedModel(folder, name="toy", threads=1)
    service = Service(model, Settings(max_tokens=32, max_batch=4, max_choices=4, max_queue=8))
    app = create_app(service)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as found:
        found.expected = ask(found)
        yield types.SimpleNamespace(http=found, service=service)


GOOD = {"model": "toy", "prompt": "import os", "max_tokens": 5, "temperature": 0}
CHATTED = {
    "model": "toy",
    "messages": [{"role": "user", "content": "import os"}],
    "max_tokens": 5,
    "temperature": 0,
}


def ask(http):
    return http.post(COMPLETIONS, json=GOOD).json()["choices"]


def check(client, answer, *names):
    """An answer, or an error of the API's shape that names the field; and the server goes on."""
    assert answer.status_code in (200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 422), (
        answer.text
    )
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"] == "invalid_request_error"
        told = f"{error['param']} {error['message']}"
        assert not names or any(name in told for name in names), told
    assert client.http.get("/healthz").json() == {"status": "ok"}
    assert ask(client.http) == client.http.expected
    assert client.service.scheduler.running == client.service.scheduler.waiting == 0


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([64, 5000, -(2**70), 2**70, 1e-320, 1e308, 0.5, -0.5]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "x", "import os", "\0", "\ud7ff", "ñ" * 40, "x" * 5000, "toy"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "1"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)
COMMON = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty"),
    *("presence_penalty", "n", "seed", "stop", "stream", "stream_options", "user", "metadata"),
    *("logprobs", "top_logprobs", "logit_bias", "tools", "response_format", "banana"),
)
OWN = {COMPLETIONS: ("prompt", "echo", "suffix", "best_of"), CHAT: ("messages",)}


@pytest.mark.parametrize("path", OWN)
@given(data=st.data())
def test_spoilt_fields(client, path, data):
    fields = (*COMMON, *OWN[path])
    changes = data.draw(st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3))
    body = {**(GOOD if path == COMPLETIONS else CHATTED), **changes}
    body = {name: value for name, value in body.items() if value is not None}
    # What is asked for must fit: a field alone may be right, and wrong beside another.
    names = (*fields, "prompt", "messages", "max_completion_tokens")
    check(client, client.http.post(path, json=body), *names)


@given(temperature=st.sampled_from([1e-320, 5e-324, 1e-300, 1e-30]), seed=st.integers(0, 99))
def test_the_least_temperatures_are_none(client, temperature, seed):
    body = {**GOOD, "temperature": temperature, "seed": seed}
    assert client.http.post(COMPLETIONS, json=body).json()["choices"] == client.http.expected


@given(
    body=st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"{", b"[]", b"null", b"[" * 50_000, b" " * 300_000, b'{"model":"toy"}']),
        st.builds(lambda value: json.dumps(value).encode(), JSON),
    ),
    path=st.sampled_from([COMPLETIONS, CHAT]),
)
def test_bodies_of_anything(client, body, path):
    headers = {"Content-Type": "application/json"}
    check(client, client.http.post(path, content=body, headers=headers))


@given(
    method=st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"]),
    path=st.sampled_from(
        ["/v1/completions", "/v1/models", "/v1/models/x/y", "/openapi.json", "/docs", "/../x", "//"]
    ),
    kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", "", "x"]),
    name=st.sampled_from(["Host", "Origin", "Authorization", "Content-Length", "X"]),
    value=st.sampled_from(["evil.example", "http://evil.example", "null", "Bearer x", "localhost"]),
)
def test_requests_of_all_kinds(client, method, path, kind, name, value):
    headers = {"Content-Type": kind, name: value}
    with contextlib.suppress(ValueError):
        answer = client.http.request(method, path, headers=headers, content=b"{}")
        foreign = "evil" in value and name in ("Host", "Origin")
        assert answer.status_code in ((400, 403, 421) if foreign else range(200, 500))
    assert ask(client.http) == client.http.expected


@given(
    numbers=st.dictionaries(
        st.sampled_from(
            ["max_batch", "max_queue", "max_tokens", "max_choices", "prefill_chunk", "max_body"]
        ),
        st.sampled_from([0, -1, 1.5, True, None, "3", 2**70]),
        min_size=1,
        max_size=1,
    )
)
def test_settings(numbers):
    ((name, value),) = numbers.items()
    if value == 2**70 and name != "max_choices":
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: |^max_choices: "):
        Settings(**numbers)
