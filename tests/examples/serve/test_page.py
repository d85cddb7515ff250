"""The page, in a real browser."""

from urllib.parse import quote

import pytest

pytest.importorskip("websockets")

from tests.examples.serve.chromium import PROGRAM, browser
from tests.examples.serve.conftest import serving, slowed

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
PROMPT = "class Stack:\n    def __init__(self"


def text(page, name):
    return page.evaluate(f"document.getElementById('{name}').textContent")


@pytest.fixture
def page(tmp_path):
    with browser(tmp_path) as opened:
        yield opened
        assert not opened.errors


def test_a_prompt_is_answered_and_the_cache_stays(page, live):
    page.open(f"{live.url}/?tokens=40&prompt={quote(PROMPT)}")
    page.wait_for("document.body?.dataset.state === 'done'")
    shown = text(page, "out")
    assert shown.startswith(PROMPT)
    assert len(shown) > len(PROMPT) + 40
    assert "40 generated; finish reason: length" in text(page, "done")
    assert text(page, "mine") == "683 KiB"
    tokens = len(live.service.model.encode(PROMPT)) + 40
    full = tokens * live.service.model.full_cache_bytes_per_token
    assert text(page, "other") == f"{full / 1024:.0f} KiB"
    assert "rows running" in text(page, "running")
    assert float(text(page, "speed")) > 0


def test_chat_goes_on_and_errors_show(page, live):
    page.open(f"{live.url}/?mode=chat&tokens=8&prompt={quote(PROMPT)}")
    page.wait_for("document.body?.dataset.state === 'done'")
    assert text(page, "prompt") == "" or page.evaluate("prompt.value") == ""
    page.evaluate(
        "document.getElementById('prompt').value = 'x ='; document.body.dataset.state = ''"
    )
    page.evaluate("document.getElementById('go').click()")
    page.wait_for("document.body.dataset.state === 'done'")
    assert page.evaluate("messages.length") == 4
    page.evaluate("document.getElementById('tokens').max = ''")
    page.evaluate(
        "document.getElementById('tokens').value = 5000; document.body.dataset.state = ''"
    )
    page.evaluate("document.getElementById('prompt').value = 'y ='; generate()")
    page.wait_for("document.body.dataset.state === 'done'")
    assert "max_tokens: got 5000, at most 1024" in text(page, "out")


def test_stop_frees_the_row_and_the_batch_fills(page, model):
    with serving(slowed(model, 0.02), max_batch=4, max_choices=4) as live:
        page.open(f"{live.url}/?tokens=900&prompt={quote(PROMPT)}")
        live.wait_until(lambda s: s.running == 1, seconds=20)
        page.wait_for("document.getElementById('go').textContent === 'Stop'")
        page.evaluate("document.getElementById('go').click()")
        live.wait_until(lambda s: s.idle)
        page.evaluate("document.getElementById('tokens').value = 30")
        page.evaluate("document.getElementById('crowd').click()")
        page.wait_for("document.querySelectorAll('#rows .on').length === 4")
        live.wait_until(lambda s: s.idle)


def test_it_fits_a_phone(page, live):
    page.open(f"{live.url}/?tokens=20&prompt={quote(PROMPT)}", width=390, height=800, dark=True)
    page.wait_for("document.body?.dataset.state === 'done'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
