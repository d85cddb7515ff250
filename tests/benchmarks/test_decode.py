"""The benchmarks run end to end at tiny sizes, and what they compare is comparable."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import less_cache as lc

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

from benchmarks import decode, host_cost, memory, prompt
from benchmarks.contestants import Dynamic, Less, Static
from benchmarks.options import numbers
from benchmarks.packing import pack
from examples.custom_loop import Decoder
from less_cache.backends import BACKENDS


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "SHORT", 16)
    monkeypatch.setattr(decode, "LONG", 64)

    def run(*arguments):
        files = [f"--json={tmp_path / 'd.json'}", f"--png={tmp_path / 'd.png'}"]
        result = invoke(decode.main, "--tiny", "--steps=2", "--hidden=8", *files, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "d.json").read_text()), result.output

    return run


def test_decode_writes_json_and_a_picture(run, tmp_path):
    report, output = run("--contexts=32,64", "--batches=1,2", "--capacity=8", "--markdown")
    assert [(row["context"], row["batch"]) for row in report["results"]] == [
        (32, 1),
        (64, 1),
        (32, 2),
        (64, 2),
    ]
    last = report["results"][-1]
    assert report["ratio_at"] == {"context": 64, "batch": 2}
    assert report["ratio_to_best_full"] == last["ratio_to_best_full"]
    fastest = min(last["static"]["median_ms"], last["dynamic"]["median_ms"])
    assert last["ratio_to_best_full"] == pytest.approx(fastest / last["less"]["median_ms"])
    assert report["step_64k_over_1k"] > 0
    assert report["less_over_rank0"] > 0
    assert report["skipped"] == []
    # 2 layers, 2 heads of 32, keys and values of float32.
    assert last["static"]["bytes"] == last["dynamic"]["bytes"] == 2 * 64 * 2 * 2 * 32 * 2 * 4
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "| batch | context |" in output


def test_decode_compares_coded_slots_with_float_ones(run):
    report, output = run(
        "--contexts=64",
        "--batches=2",
        "--capacity=8",
        "--bits=2,8",
        "--backend=torch",
        "--markdown",
    )
    assert [row["bits"] for row in report["results"]] == [2, 8]
    first = report["results"][0]
    # 32 channels: 8 bytes of codes for a key or value, a scale of 2, a score and a position.
    float_bytes, coded_bytes = 2 * 32 * 4 + 8, 2 * (8 + 2) + 8
    assert first["slots_in_as_many_bytes"] == 8 * float_bytes // coded_bytes
    lengths = 2 * 2 * 4
    assert first["coded_bytes"] == 2 * 2 * 2 * 8 * coded_bytes + lengths
    assert first["ratio"] == pytest.approx(
        first["coded"]["median_ms"] / first["float32"]["median_ms"]
    )
    assert "| batch | slots | bits |" in output


def test_the_picture_lies_beside_the_results_unless_told_otherwise(tmp_path, monkeypatch):
    """A run with `--json elsewhere` leaves the tracked pictures alone."""
    monkeypatch.setattr(decode, "SHORT", 16)
    monkeypatch.setattr(decode, "LONG", 64)
    sizes = ["--tiny", "--steps=2", "--hidden=8", "--contexts=32", "--batches=1", "--capacity=8"]
    result = invoke(decode.main, *sizes, f"--json={tmp_path / 'd.json'}")
    assert result.exit_code == 0, result.output
    sizes = ["--tokens=20", "--full-tokens=10", "--capacity=8"]
    result = invoke(memory.main, *sizes, f"--json={tmp_path / 'm.json'}")
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["d.json", "d.png", "m.json", "m.png"]


def test_decode_leaves_out_what_does_not_fit(run, monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda: 200_000)
    report, _ = run("--contexts=32,1k", "--batches=1", "--capacity=0.25")
    small, large = report["results"]
    assert "static" in small
    assert "static" not in large
    assert large["ratio_to_best_full"] is None
    assert {entry["cache"] for entry in report["skipped"]} == {"static", "dynamic"}
    assert all(entry["context"] == 1024 for entry in report["skipped"])
    assert report["ratio_at"] == {"context": 32, "batch": 1}
    # A share of the context: the cache grows with it.
    assert large["less"]["bytes"] > 20 * small["less"]["bytes"]


def test_a_result_is_shown_again_without_measuring(run, monkeypatch):
    report, _ = run("--contexts=32", "--batches=1", "--capacity=8")
    monkeypatch.setattr(decode, "run", None)
    again, _ = run("--from-json")
    assert again == report


@pytest.mark.parametrize("text", ["", "0", "1.5k", "a", "-4"])
def test_contexts_that_are_no_numbers_are_refused(text):
    with pytest.raises(typer.BadParameter, match="positive integers"):
        numbers(text)


def test_numbers():
    assert numbers("8k,1024, 16") == [16, 1024, 8192]


@pytest.mark.parametrize("kind", [Static, Dynamic])
def test_full_caches_step_to_exactly_the_context_every_time(kind):
    shape = decode.TINY
    contestant = kind(shape, 32, 2)
    q, k, v = (torch.randn(2, 2, 1, shape.head_dim) for _ in range(3))
    outputs = []
    for _ in range(3):
        contestant.rewind()
        for layer in range(shape.layers):
            out = contestant.attend(layer, q, k, v)
        assert contestant.cache.layers[0].keys.shape[2] == 32
        assert int(contestant.cache.get_seq_length()) == 32
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[2])
    keys = contestant.cache.layers[0].keys
    torch.testing.assert_close(keys[:, :, -1:], k)
    assert bool((keys[:, :, :-1].abs().sum(3) > 0).all())


@pytest.mark.parametrize(("context", "held"), [(5, 4), (100, 8)])
def test_a_less_cache_starts_as_after_that_many_tokens(context, held):
    contestant = Less(decode.TINY, context, 2, capacity=8, policy=lc.H2O(), hidden=8)
    for layer in contestant.state.layers:
        assert (layer.positions >= 0).sum(1).tolist() == [held * 2] * 2
        assert int(layer.positions.max()) == context - 2
        assert layer.length.tolist() == [context - 1] * 2
    q, k, v = (torch.randn(2, 2, 1, 32) for _ in range(3))
    assert bool(contestant.attend(0, q, k, v).isfinite().all())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_packed_layers_give_the_same_logits():
    torch.manual_seed(0)
    decoder = Decoder(decode.TINY).eval()
    tokens = torch.zeros(3, 1, dtype=torch.int64)
    with torch.inference_mode():
        before = decoder(tokens, 5, lambda layer, q, k, v: v)
        pack(decoder, 8)
        after = decoder(tokens, 5, lambda layer, q, k, v: v)
    torch.testing.assert_close(before, after)


def test_memory_writes_json_and_a_picture(tmp_path):
    result = invoke(
        memory.main,
        "--tokens=60",
        "--full-tokens=20",
        "--capacity=8",
        f"--json={tmp_path / 'm.json'}",
        f"--png={tmp_path / 'm.png'}",
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["less"]["samples"][-1]["tokens"] == 60
    assert report["dynamic"]["samples"][-1]["tokens"] == 20
    assert report["peak_rss"] > 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_the_prompt_benchmark_compares_all_policies_with_the_full_cache(tmp_path):
    file = tmp_path / "p.json"
    result = invoke(
        prompt.main, "--tiny", "--contexts=64", "--batches=1,2", "--capacity=16",
        "--repeats=1", "--steps=1", "--threads=1", f"--json={file}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    rows = [row for row in report["results"] if row["batch"] == 2]
    names = {row["cache"] for row in rows}
    assert {"full cache", "SinkWindow", "ObservationWindow + LESS, rank 8", "H2O"} <= names
    assert all(row["prompt_ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    assert report["command"].startswith("benchmarks/")


def test_the_host_cost_is_measured_in_every_dtype(tmp_path, monkeypatch):
    # Registered for this test alone.
    monkeypatch.setitem(BACKENDS, host_cost.STAND_IN, None)
    del BACKENDS[host_cost.STAND_IN]
    file = tmp_path / "h.json"
    result = invoke(host_cost.main, "--layers=2", "--repeats=2", f"--json={file}")
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    dtypes = {"float32", "float16", "bfloat16", "float64"}
    found = [(row["dtype"], row["rank"]) for row in report["results"]]
    assert sorted(found) == sorted((dtype, rank) for dtype in dtypes for rank in (0, 8))
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in report["results"])
