"""The command line, on the shipped model and tiny runs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from less_cache import cli, reference_model
from less_cache.evaluation import demo
from less_cache.feature_maps import FeatureMaps

runner = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(reference_model.held_out_documents()[0].text[:8000])
    return path


@pytest.fixture(scope="module")
def maps(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps")
    arguments = ["train", "--data", str(text), "--out", str(out), "--length", "96"]
    arguments += ["--sequences", "8", "--capacity", "16", "--recipe", "fast", "--epochs", "1"]
    result = runner.invoke(cli.app, [*arguments, "--hidden", "8"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Validation error" in result.output
    return out


def test_train_then_distill_then_eval(maps, text, tmp_path):
    distilled = tmp_path / "distilled"
    arguments = ["distill", "--data", str(text), "--maps", str(maps), "--out", str(distilled)]
    arguments += ["--length", "96", "--capacity", "16", "--steps", "2", "--batch", "1"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = tmp_path / "report"
    arguments = ["eval", "--data", str(text), "--out", str(report), "--length", "96"]
    arguments += ["--maps", f"LESS={maps}", "--maps", f"LESS distilled={distilled}"]
    arguments += ["--capacity", "16", "--windows", "4", "--prompts", "2", "--new-tokens", "4"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    data = json.loads((report / "comparison.json").read_text())
    assert [cache["name"] for cache in data["caches"]][3:] == ["LESS", "LESS distilled"]
    assert data["windows"] == 4


def test_layers_in_parts_are_merged(text, tmp_path):
    common = ["--data", str(text), "--length", "96", "--sequences", "6", "--capacity", "16"]
    common += ["--recipe", "fast", "--epochs", "1", "--hidden", "4", "--policy", "sinkwindow"]
    for part in ("0:3", "3:6"):
        out = str(tmp_path / part.replace(":", "-"))
        result = runner.invoke(
            cli.app, ["train", *common, "--out", out, "--layers", part], catch_exceptions=False
        )
        assert "still missing" in result.output
    whole = tmp_path / "whole"
    folders = [str(tmp_path / "0-3"), str(tmp_path / "3-6")]
    result = runner.invoke(cli.app, ["merge", *folders, "--out", str(whole)])
    assert result.exit_code == 0, result.output
    assert len(FeatureMaps.from_pretrained(whole)) == 6


def test_info_describes_machine_and_maps(maps):
    result = runner.invoke(cli.app, ["info", "--maps", str(maps)], catch_exceptions=False)
    assert "backends" in result.output
    assert "per layer" in result.output


def test_demo_writes_a_page_to_look_at(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "index.html").read_text()
    assert "$" not in page.replace("$(", "")
    assert page.count("data:image/png;base64,") == 2
    assert page.count("<section>") == 3
    data = json.loads((tmp_path / "demo.json").read_text())
    assert [item["name"] for item in data["continuations"]] == [
        "full cache",
        "policy alone",
        "LESS",
    ]
    assert data["continuations"][0]["agreed"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere", "--out", "x"], "no file or folder"),
        (["train", "--data", "{text}", "--out", "x", "--recipe", "best"], "recipe"),
        (["train", "--data", "{text}", "--out", "x", "--capacity", "many"], "capacity"),
        (["train", "--data", "{text}", "--out", "x", "--policy", "lru"], "policy"),
        (["train", "--data", "{text}", "--out", "x", "--length", "64"], "layers"),
        (["train", "--data", "{text}", "--out", "x", "--dtype", "int8"], "dtype"),
        (["eval", "--maps", "nameless"], "NAME=FOLDER"),
        (["eval", "--maps", "a=nowhere"], "nowhere"),
        (["merge", "nowhere", "--out", "x"], "run.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_told_in_a_line(arguments, message, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("{text}", str(text)) for argument in arguments]
    if message == "layers":
        arguments += ["--layers", "5:9"]
    monkeypatch.setattr("sys.argv", ["less-cache", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    told = capsys.readouterr().out
    assert told.startswith("error:")
    assert message in told.replace("\n", " ")
    assert "Traceback" not in told


def test_bench_prints_a_line_for_each_cache():
    arguments = ["bench", "--context", "256", "--batch", "1", "--query-heads", "2"]
    arguments += ["--kv-heads", "1", "--head-dim", "16"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("full cache", "H2O alone (torch)", "LESS (torch)"):
        assert name in result.output
