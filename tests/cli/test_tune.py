"""The command, on a tiny model: the folder that it writes is what the other commands take."""

import json

import numpy as np
import pytest

import less_cache as lc

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from less_cache.cli.main import app
from tests.integrations.models import build

LENGTH = 40


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    build("llama").save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(3, 90, (12, LENGTH))
    np.save(folder / "text.npy", ids)
    return folder


def run(*words):
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=True)


def test_it_writes_a_cache_and_a_report(files):
    out = files / "cache"
    words = ["--model", files / "model", "--data", files / "text.npy", "--length", LENGTH]
    done = run("tune", *words, "--context", LENGTH, "--budget", "60%", "--steps", 0, "--out", out)
    assert done.exit_code == 0, done.output
    assert "bytes a sequence" in done.output
    assert lc.CacheRecipe.from_pretrained(out).record["method"] == "less-cache tune"
    report = json.loads((out / "report.json").read_text())
    assert report["model_id"] == "model"
    # Nothing of this machine's folders is told.
    for file in ("report.json", "index.html", "README.md"):
        assert str(files) not in (out / file).read_text().replace(report["command"], "")
    shown = run("info", "--cache", out)
    assert shown.exit_code == 0, shown.output
    assert "slots by KV head" in shown.output


def test_layers_may_be_measured_on_their_own(files, tmp_path):
    words = ["--model", files / "model", "--data", files / "text.npy", "--length", LENGTH]
    words += ["--context", LENGTH, "--budget", "60%", "--steps", 0, "--out", tmp_path]
    for layer, left in ((1, "still to be measured: 0."), (0, "Measured.")):
        done = run("tune", *words, "--layers", layer)
        assert done.exit_code == 0, done.output
        assert left in " ".join(done.output.split())
    assert sorted(p.name for p in (tmp_path / "work" / "losses").iterdir()) == [
        "000.json",
        "001.json",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "0"], "minutes"),
        (["--layers", "2"], "layers: got '2', expected a part of 0:2"),
        (["--layers", "0", "--ray", "local"], "layers: given, and ray too"),
        (["--minutes", "1", "--steps", "2"], "steps: given, and minutes too"),
        (["--budget", "none"], "budget: got 'none'"),
        (["--gpus", "1"], "gpus: got 1 without --ray"),
        (["--ray", "local", "--device", "cuda"], "gpus: got 0, but --device cuda"),
    ],
)
def test_bad_options_are_told(files, tmp_path, words, told):
    given = ["--model", files / "model", "--data", files / "text.npy", "--length", LENGTH]
    done = run("tune", *given, "--out", tmp_path / "out", *words)
    assert done.exit_code != 0
    assert told in str(done.exception)
