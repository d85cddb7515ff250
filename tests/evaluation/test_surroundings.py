"""Where something was measured, without what only its machine knows."""

import json
import sys
from types import SimpleNamespace

import pytest

from less_cache.evaluation.surroundings import surroundings


@pytest.mark.parametrize(
    ("spec", "program", "told"),
    [
        (None, "/home/me/.venv/bin/less-cache", "less-cache"),
        ("less_cache.cli.__main__", "/home/me/cli/__main__.py", "python -m less_cache.cli"),
        ("benchmarks.decode", "/home/me/benchmarks/decode.py", "python -m benchmarks.decode"),
    ],
)
def test_the_command_is_one_that_others_can_run(monkeypatch, spec, program, told):
    main = SimpleNamespace(__spec__=spec and SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr("sys.argv", [program, "demo", "--out", "a b"])
    found = surroundings()
    assert found["command"] == f"{told} demo --out 'a b'"
    assert "/home" not in json.dumps(found)
    assert set(found) == {"command", "date", "machine", "versions"}
