"""The benchmark of coded slots at a tiny size: equal bytes, peers, and parts that stay."""

import json
import math

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("psutil")

from benchmarks import quantization
from benchmarks.leaderboard.continuing import tensor_bytes
from benchmarks.quantization import Entry, filled_bytes, perplexity, table_rows
from less_cache.evaluation.perplexity import Contestant, Window, score
from less_cache.reference_model import load
from tests.benchmarks.test_decode import invoke
from tests.integrations.models import build


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "PROMPT", 8)
    _, tokenizer = load()
    ids = torch.tensor(tokenizer("def f(x):\n    return x\n" * 40)["input_ids"])
    # The training text is that of one version of Python.
    monkeypatch.setattr(quantization, "training_windows", lambda count: ids[:64].view(1, 64))

    def run(*arguments):
        options = ("--windows=1", "--length=48", "--bits=3", "--policies=sinkwindow:sinks=1")
        more = ("--steps=1", "--repeats=1", "--batch=1", f"--json={tmp_path / 'q.json'}")
        result = invoke(quantization.main, *options, *more, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "q.json").read_text()), result.output

    return run


def test_every_cache_is_judged_at_equal_bytes_and_parts_stay(run):
    report, output = run("--no-speed", "--markdown")
    rows = {row["name"]: row for row in report["quality"]["rows"]}
    less = rows["LESS on H2O, 16 bits"]
    for name, row in rows.items():
        if row["grows"]:
            assert row["slots"] is None
            continue
        assert math.isfinite(row["perplexity"])
        if "16 bits" in name:
            assert row["nbytes"] >= less["nbytes"]
        else:
            assert 0 <= less["nbytes"] - row["nbytes"] < 24 * 64
    coded, plain = rows["SinkWindow, 3 bits, calibrated"], rows["SinkWindow, 16 bits"]
    assert coded["slots"] > 3 * plain["slots"]
    assert rows["QuantizedCache, float8"]["perplexity"] > 1
    assert "| SinkWindow, 3 bits, hadamard | " in output
    again, _ = run("--no-quality")
    assert again["quality"] == report["quality"]
    timed = {row["name"]: row["tokens_per_second"] for row in again["speed"]["rows"]}
    assert timed.keys() >= {"full cache", "QuantizedCache, float8", "SinkWindow, 3 bits, hadamard"}
    assert all(rate > 0 for rate in timed.values())


def test_what_is_not_installed_says_so(monkeypatch):
    model = build("llama")

    def missing(*given, **named):
        raise ImportError("no quanto")

    monkeypatch.setattr(quantization, "QuantizedCache", missing)
    monkeypatch.setattr(quantization, "training_windows", lambda count: None)
    entries = [*quantization.growing(model, [], 32, quantization.Bases(model, 1))]
    assert [entry.missing for entry in entries] == ["", *["needs optimum-quanto"] * 3]
    row = {"name": entries[1].name, "slots": None, "nbytes": None, "grows": True}
    told = table_rows({"quality": {"rows": [{**row, "missing": entries[1].missing}]}})
    assert told == [[row["name"], "", "", "not measured: needs optimum-quanto", "", ""]]


def test_a_peer_is_scored_as_the_model_itself(monkeypatch):
    monkeypatch.setattr(quantization, "PROMPT", 5)
    model = build("llama")
    draws = torch.Generator().manual_seed(0)
    windows = [Window("d", torch.randint(3, 97, (20,), generator=draws)) for _ in range(3)]
    peer = Entry("a peer", 0, True, peer=DynamicCache)
    wanted = score(model, windows, Contestant("full"), progress=False).perplexity()
    assert perplexity(model, peer, windows, 2) == pytest.approx(wanted, rel=1e-5)


def test_bytes_of_tensors_made_of_tensors():
    class Made(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scale"], None

    made = torch.zeros(100).as_subclass(Made)
    made.codes, made.scale = torch.zeros(7, dtype=torch.uint8), torch.zeros(2, dtype=torch.half)
    assert tensor_bytes([made, {"zero": torch.zeros(3)}, None, 5]) == 7 + 4 + 6
    model = build("llama")
    assert filled_bytes(DynamicCache(), model, 10) == 2 * 2 * 2 * 12 * 2 * 10
