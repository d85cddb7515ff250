"""`python -m benchmarks.gpu` without a card: parts that fail, hang or cannot run; their page."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import less_cache as lc
from benchmarks.gpu import __main__ as first_run
from benchmarks.gpu import parts
from benchmarks.gpu.page import page_of
from benchmarks.gpu.parts import PARTS, Part, run_part
from tests.backends.triton.oracle import DEVICE
from tests.tape import use_tapes

TINY = {"device": torch.device(DEVICE), "batch": 2, "hidden": 8}


def part(code, seconds=60, reason=""):
    return Part("fake", "A fake", (sys.executable, "-c", code, "{json}"), seconds, lambda: reason)


def invoke(monkeypatch, chosen, *arguments):
    monkeypatch.setattr(first_run, "PARTS", chosen)
    app = first_run.typer.Typer()
    app.command()(first_run.main)
    return CliRunner().invoke(app, arguments)


WRITES = (
    "import sys, json; json.dump({'rows': [{'a': 1.23456, 'b': 'x|y'}]}, open(sys.argv[1], 'w'))"
)


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        (WRITES, "passed", ""),
        ("raise RuntimeError('no such kernel')", "failed", "RuntimeError: no such kernel"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "exit status -11"),
        ("import sys; print('no harness'); sys.exit(77)", "skipped", "no harness"),
    ],
)
def test_a_part_says_what_became_of_it(code, outcome, reason):
    found = run_part(part(code))
    assert (found["outcome"], found["reason"]) == (outcome, reason)
    assert (found["result"] is not None) == (code is WRITES)


def test_a_part_that_hangs_is_stopped_with_its_children():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    found = run_part(part(f"{code}; import time; time.sleep(600)", seconds=1))
    assert found["outcome"] == "failed"
    assert found["reason"] == "not done after 1 s"


def test_what_follows_a_failed_part_still_runs(tmp_path, monkeypatch):
    chosen = (part("raise ValueError('first')"), part("", reason="no card"), part(WRITES))
    result = invoke(monkeypatch, chosen, "--out", str(tmp_path))
    assert result.exit_code == 1, result.output
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert [found["outcome"] for found in report["parts"]] == ["failed", "skipped", "passed"]
    assert report["environment"]["versions"]["torch"] == torch.__version__
    page = path.with_suffix(".md").read_text()
    assert page == page_of(report)
    assert "ValueError: first" in page
    assert "| 1.235 | x\\|y |" in page


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA GPU is here")
def test_without_a_card_every_part_says_why_it_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_run", lambda *_: pytest.fail("something was run"))
    result = invoke(monkeypatch, PARTS, "--out", str(tmp_path))
    assert result.exit_code == 2, result.output
    report = json.loads((tmp_path / "gpu_no_card.json").read_text())
    assert [found["outcome"] for found in report["parts"]] == ["skipped"] * len(PARTS)
    assert all("finds no CUDA GPU" in found["reason"] for found in report["parts"])


def test_unknown_parts_are_refused(tmp_path, monkeypatch):
    result = invoke(monkeypatch, PARTS, "--only", "speed", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "speed" in result.output
    assert not (tmp_path / "out").exists()


def test_every_command_names_a_module_that_is_there():
    for one in PARTS:
        assert one.command[1] == "-m"
        __import__(one.command[2])


@pytest.mark.parametrize("policy", [lc.H2O(), lc.Scissorhands(window=9)])
def test_repeated_steps_are_compared_bit_by_bit(policy, monkeypatch):
    from benchmarks.gpu import repeats

    row = repeats.repeated(policy, 5, 2, heads=(4, 2, 16), dtype="float32", **TINY)
    assert (row["unequal"], row["in"]) == (0, "")
    step, calls = lc.step, []

    def racing(plan, arrays, *tokens, **given):
        calls.append(1)
        out = step(plan, arrays, *tokens, **given)
        arrays.z[0, 0, 0] += len(calls) == 2
        return out

    monkeypatch.setattr(lc, "step", racing)
    row = repeats.repeated(policy, 5, 2, heads=(4, 2, 16), dtype="float32", **TINY)
    assert (row["unequal"], row["in"]) == (1, "z")


def test_shapes_are_compared_with_torch_in_float32():
    from benchmarks.gpu import shapes

    given = {"heads": (4, 2, 16), "capacity": 9, "prompt": 20, **TINY}
    row = shapes.compared("tiny", dtype="float16", **given)
    assert not shapes.wrong(row), row
    row["step, output"] = float("nan")
    assert shapes.wrong(row)


def test_each_kernel_is_launched_apart_with_what_it_needs():
    from benchmarks.gpu import kernels

    device = torch.device(DEVICE)
    longer = kernels.layer_of(4, 2, 16, 600, dtype="float32", hidden=8)
    (one,) = kernels.launches_of(*longer, 2, device, 1)
    assert [kernels.name_of(launch) for launch in one[:3]] == ["select", "map", "attend"]
    layer, maps = kernels.layer_of(4, 2, 16, 300, dtype="float32", hidden=8)
    steps = kernels.launches_of(layer, maps, 2, device, 2)
    names = [kernels.name_of(one) for one in steps[0]]
    assert names[:2] == ["select_and_map", "attend"]
    assert set(names) <= set(kernels.bytes_of(layer, 2))
    for one in (one for step in steps for one in step):
        kernels.launched(one, device)
    assert bool(steps[1][1].arguments["out"].isfinite().all())


def test_captured_steps_are_compared_with_uncaptured_ones(monkeypatch):
    from benchmarks.gpu import captured
    from tests.integrations.models import model_of

    tapes = use_tapes(monkeypatch) if DEVICE == "cpu" else None
    given = {"capacity": 5, "prompt": 6, "new_tokens": 3, "hidden": 8, "rank": 1}
    row = captured.compared(model_of("llama").to(DEVICE), lc.H2O(), 1, **given)
    assert not captured.wrong(row), row
    assert tapes is None or sum(tape.replays for tape in tapes) == 2 + 3
    assert captured.wrong(row | {"greatest difference": 1e-3})
