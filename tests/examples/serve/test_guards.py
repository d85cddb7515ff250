"""Who may ask: keys, names of the server, and pages of other sites."""

import re

import httpx
import pytest

from examples.serve.app import PAGE
from examples.serve.settings import Settings
from tests.examples.serve.conftest import serving

JSON = {"Content-Type": "application/json"}


def ask(live, **headers):
    body = f'{{"model": "{live.name}", "prompt": "x = ", "max_tokens": 1}}'
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(live.url + "/v1/completions", content=body, headers={**JSON, **sent})


@pytest.fixture(scope="module")
def locked(model):
    with serving(model, api_key="schlüssel✓", allowed_hosts=("model.test", "*.lan")) as live:
        yield live


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_has_no_case_and_a_key_any_letters(locked, scheme):
    assert ask(locked, Authorization=f"{scheme} schlüssel✓".encode()).status_code == 200


@pytest.mark.parametrize("sent", ["", "schlüssel✓", "Basic schlüssel✓", "Bearer x", "Bearer"])
def test_other_keys_are_refused(locked, sent):
    answer = ask(locked, Authorization=sent.encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_nothing_describes_a_locked_server(locked):
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert httpx.get(locked.url + path).status_code == 404


@pytest.mark.parametrize("path", ["/health", "/healthz"])
@pytest.mark.parametrize("host", ["localhost", "10.1.2.3:8000"])
def test_health_has_both_names_for_whoever_asks(locked, path, host):
    answer = httpx.get(locked.url + path, headers={"Host": host})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("host", ["localhost:99", "127.0.0.1", "[::1]:8000", "MODEL.test", "a.lan"])
def test_allowed_names_pass(locked, host):
    for path in ("/", "/stats", "/metrics"):
        assert httpx.get(locked.url + path, headers={"Host": host}).status_code == 200
    key = "Bearer schlüssel✓".encode()
    assert ask(locked, Host=host, Origin=f"http://{host}", Authorization=key).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "lan", "localhost.evil", ""])
def test_a_name_that_was_not_allowed_is_refused(live, host):
    """What a browser sends when a site has its name point to this machine."""
    for answer in (ask(live, Host=host), httpx.get(live.url + "/stats", headers={"Host": host})):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert f"Host: got {host!r}" in error["message"]
        assert "--allowed-host" in error["message"]


@pytest.mark.parametrize("origin", ["http://evil.example", "https://6.6.6.6:8000", "null"])
def test_another_sites_page_is_refused(live, origin):
    answer = ask(live, Origin=origin)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_a_browser_sends_unasked_is_refused(live, path, kind):
    answer = httpx.post(live.url + path, content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert f"Content-Type: got {kind!r}" in answer.json()["error"]["message"]
    assert "expected 'application/json'" in answer.json()["error"]["message"]


def test_json_may_name_its_characters(live):
    assert ask(live, Content_Type="Application/JSON; charset=utf-8").status_code == 200


def test_any_name_may_be_allowed(model):
    with serving(model, allowed_hosts=("*",)) as live:
        assert ask(live, Host="whoever.example", Origin="http://another.example").is_success


@pytest.mark.parametrize("host", ["", "*.", "a*", "*a", "a.*.b", "**", "http://a"])
def test_names_are_checked_at_the_start(host):
    with pytest.raises(ValueError, match="allowed_hosts: got"):
        Settings(allowed_hosts=(host,))


@pytest.mark.parametrize("key", [" a", "a\n"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(ValueError, match="api_key: begins or ends with a blank"):
        Settings(api_key=key)


def test_the_page_keeps_its_own_policy(live):
    policy = httpx.get(live.url + "/").headers["content-security-policy"]
    told = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    icon = re.search(r'rel="icon" href="([a-z]+:)', PAGE.read_text(encoding="utf-8")).group(1)
    assert icon in told["img-src"].split()
