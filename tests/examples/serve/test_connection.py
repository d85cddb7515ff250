"""Clients that a server of the open net meets: silent, slow, many, half gone."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from examples.serve import connection, intake
from examples.serve.model import SHIPPED
from tests.examples.serve.conftest import serving, slowed
from tests.examples.serve.test_load import raw_request

PROMPT = "import os\nimport sys\n"


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)


def read_all(client):
    """What comes until the server closes; a test that waits for ever fails."""
    client.settimeout(20)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            data += part
    return data


def told(data):
    """Status and error of an answer's bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.usefixtures("hasty")
def test_a_silent_connection_is_closed(live):
    with socket.create_connection(live.address) as client:
        assert read_all(client) == b""


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("sent", [b"P", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"])
def test_half_a_head_is_answered_and_closed(live, sent):
    with socket.create_connection(live.address) as client:
        client.sendall(sent)
        status, error = told(read_all(client))
    assert status == 408
    assert error["message"] == "The request's head took longer than 0.3 s"


def test_half_a_body_is_answered_and_closed(live, monkeypatch):
    monkeypatch.setattr(intake, "BODY_SECONDS", 0.3)
    with socket.create_connection(live.address) as client:
        client.sendall(raw_request({"model": live.name, "prompt": PROMPT})[:-5])
        data = read_all(client)
    status, error = told(data)
    assert b"\r\nconnection: close\r\n" in data.lower()
    assert (status, error["message"]) == (408, "The body took longer than 0.3 s")


def test_who_leaves_amid_a_body_is_counted_and_no_error(model, caplog):
    logger = logging.getLogger("uvicorn.error")
    with serving(model) as live:
        logger.addHandler(caplog.handler)
        try:
            with socket.create_connection(live.address) as client:
                client.sendall(raw_request({"model": live.name, "prompt": PROMPT})[:-5])
                httpx.get(live.url + "/healthz")
            cancelled = 'requests_total{outcome="cancelled"} 1.0'
            until = time.monotonic() + 10
            while cancelled not in httpx.get(live.url + "/metrics").text:
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.usefixtures("hasty")
def test_drops_of_a_head_do_not_count_as_one(live):
    """The time is one for the whole head, and for each request of a connection."""
    with socket.create_connection(live.address) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(20)
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(OSError):
            for _ in range(200):
                client.sendall(b"G")
                time.sleep(0.02)
            pytest.fail("the connection is still open")


@pytest.mark.usefixtures("hasty")
def test_an_answer_may_take_longer_than_a_head(model):
    with serving(slowed(model, 0.05)) as live:
        assert live.complete(PROMPT, max_tokens=20).usage.completion_tokens == 20


def test_what_is_no_http_is_told_so(live):
    with socket.create_connection(live.address) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, error = told(read_all(client))
    assert (status, error["message"]) == (400, "Invalid HTTP request received.")


def test_a_crowd_that_says_nothing_does_not_keep_others_out(model):
    with serving(model, max_connections=8) as live, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(live.address)) for _ in range(20)]
        for client in silent[::2]:
            with contextlib.suppress(OSError):
                client.sendall(raw_request({"model": live.name})[:-5])
        for _ in range(3):
            assert httpx.get(live.url + "/healthz").status_code == 200
        assert live.complete(PROMPT, max_tokens=2).choices


def test_connections_that_are_answered_are_not_given_up(model):
    with serving(slowed(model, 0.02), max_connections=2) as live:
        streams = [live.complete(PROMPT, max_tokens=200, stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        answer = httpx.get(live.url + "/healthz")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "too_many_connections"
        assert answer.headers["retry-after"] == "1"
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_client_that_reads_nothing_is_cut_off(live, monkeypatch):
    """What was sent is more than the system's buffers hold."""
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.3)
    page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(live.address)
        client.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                client.sendall(page)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012 - many sends
            until = time.monotonic() + 20
            while time.monotonic() < until:
                with contextlib.suppress(TimeoutError):
                    client.sendall(page)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_sends_no_more_is_answered(model, stream, version):
    body = {"model": SHIPPED, "prompt": PROMPT, "max_tokens": 30, "stream": stream}
    request = raw_request(body).replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1)
    with serving(slowed(model, 0.01)) as live:
        with socket.create_connection(live.address) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            data = read_all(client)
        finals = [part for part in data.split(b"HTTP/1.1 ") if part[:3] == b"200"]
        assert len(finals) == 1
        assert (b"data: [DONE]" if stream else b'"completion_tokens":30') in finals[0]
        # The interim ones are for clients that know them.
        assert (b" 102 " in data) <= (version == "1.1")
        live.wait_until(lambda s: s.idle)
        assert 'outcome="cancelled"' not in httpx.get(live.url + "/metrics").text


def test_requests_sent_ahead_are_answered_before_the_end(live):
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(live.address) as client:
        client.sendall(health * 3)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("wish", ["websocket", "h2c"])
def test_a_wish_to_upgrade_is_passed_over(live, wish):
    """As HTTP has it; with a WebSocket library installed, uvicorn used to wait for a handshake."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": wish,
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    body = {"model": live.name, "prompt": PROMPT, "max_tokens": 3}
    with httpx.Client(base_url=live.url, headers=headers, timeout=20) as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 3
        assert client.get("/healthz").status_code == 200


def test_every_request_is_logged_but_the_pages_own(live):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(handler)
    try:
        httpx.get(live.url + "/healthz")
        httpx.get(live.url + "/nothing")
        httpx.get(live.url + "/stats")
    finally:
        logger.removeHandler(handler)
    lines = [line.split(" - ", 1)[1] for line in seen]
    assert lines == ['"GET /healthz HTTP/1.1" 200', '"GET /nothing HTTP/1.1" 404']


PATIENT = """
import sys
from pathlib import Path
from examples.serve import server
from examples.serve.__main__ import main

server.CLOSE_SECONDS = 1000
main(model=Path(sys.argv[1]), name=sys.argv[2], port=int(sys.argv[3]), shutdown_grace=1000.0)
"""


@pytest.mark.parametrize("grace", ["answering", "closing"])
def test_a_second_signal_ends_it_whatever_goes_on(folder, grace):
    """A server with patience for quarters of hours: only the second signal can end it in time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT, str(folder), SHIPPED, str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                httpx.get(url + "/healthz")
                break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        body = {"model": SHIPPED, "prompt": [PROMPT] * 30, "max_tokens": 1000, "n": 8}
        with socket.create_connection(("127.0.0.1", port)) as client:
            # One has much to wait for; the other has sent half a request.
            client.sendall(raw_request(body)[: None if grace == "answering" else -5])
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            log, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM
        # The access log is on by default.
        assert '"GET /healthz HTTP/1.1" 200' in log
    finally:
        process.kill()
        process.wait(10)
