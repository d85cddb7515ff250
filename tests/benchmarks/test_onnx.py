"""The benchmarks of exported models run end to end at tiny sizes."""

import json
from importlib.util import find_spec

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from benchmarks import onnx_codes, onnx_decode, onnx_profile

SIZES = ("--tiny", "--batch=2", "--capacity=8", "--rank=2", "--hidden=8", "--steps=2")


def invoke(main, *arguments):
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_decode_compares_with_full_caches(tmp_path):
    genai = find_spec("onnxruntime_genai") is not None
    files = [f"--json={tmp_path / 'd.json'}", f"--png={tmp_path / 'd.png'}"]
    contexts = ["--contexts=16,32,64", "--full-up-to=32"]
    invoke(onnx_decode.main, *SIZES, *contexts, *files, "--genai" if genai else "--no-genai")
    report = json.loads((tmp_path / "d.json").read_text())
    short, middle, long = report["results"]
    assert [row["context"] for row in report["results"]] == [16, 32, 64]
    assert short["less_bytes"] == long["less_bytes"]
    assert short["full_bytes"] < middle["full_bytes"]
    assert "full" not in long
    medians = [middle[name]["median_ms"] for name in ("full", "genai") if name in middle]
    assert middle["faster_than_best_full"] == pytest.approx(
        min(medians) / middle["less"]["median_ms"]
    )
    assert ("genai" in middle) == (report["genai"] == "built")
    assert genai or report["genai"] == "not asked for"
    assert (tmp_path / "d.png").stat().st_size > 1000


def test_every_way_of_unpacking_takes_a_step(tmp_path):
    path = tmp_path / "c.json"
    sizes = ("--bits=3,8", "--batch=2", "--capacity=8", "--repeats=4")
    output = invoke(onnx_codes.main, *sizes, f"--json={path}")
    results = json.loads(path.read_text())["results"]
    # 128 channels: 48 and 128 bytes of codes, a scale each, a score and a position.
    assert results["slot_bytes"] == {"32": 1032, "3": 108, "8": 268}
    assert len(results["times"]) == 1 + 2 * len(onnx_codes.WAYS)
    assert all(way in output for way in onnx_codes.WAYS)


def test_profile_accounts_for_every_product():
    output = invoke(onnx_profile.main, *SIZES)
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:4]
        for line in output.splitlines()
        if line.count("│") == 4
    }
    nodes = {name: int(count) for name, (count, _) in rows.items()}
    # Two layers: q, k, v, o and three of the feed-forward each, and the head.
    assert nodes["products with the model's weights"] == 2 * 7 + 1
    # φ and ψ, two matrices each.
    assert nodes["products with the maps' weights"] == 2 * 4
    # Logits, weighted values, the merge into H, φH and φz.
    assert nodes["products with keys and values, H and z"] == 2 * 5
    assert "One step:" in output


def test_contexts_that_are_no_numbers_are_refused():
    app = typer.Typer()
    app.command()(onnx_decode.main)
    result = CliRunner().invoke(app, [*SIZES, "--contexts=1.5k"])
    assert result.exit_code == 2
    assert "positive integers" in result.output
