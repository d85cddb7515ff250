"""``less-cache export onnx``."""

import numpy as np
import pytest
from typer.testing import CliRunner

from exporters.onnx import OnnxDecoder
from less_cache.cli import app
from less_cache.cli.export import export


def test_the_shipped_model_is_one_command_away(tmp_path):
    result = CliRunner().invoke(
        app,
        ["export", "onnx", "--out", str(tmp_path), "--policy", "sinkwindow", "--capacity", "52"],
    )
    assert result.exit_code == 0, result.output
    decoder = OnnxDecoder(tmp_path, threads=1)
    assert decoder.manifest.config.capacity == 52
    assert (tmp_path / "tokenizer.json").is_file()
    tokens = decoder.generate(np.array([[5, 6, 7]]), max_new_tokens=4)
    assert tokens.shape[0] == 1


@pytest.mark.parametrize("app_under_test", [app, export])
def test_help_tells_of_the_formats(app_under_test):
    arguments = ["onnx", "--help"] if app_under_test is export else ["export", "onnx", "--help"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app_under_test, arguments)
    assert result.exit_code == 0
    assert "genai" in result.output


def test_an_unknown_format_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["export", "onnx", "--out", str(tmp_path), "--format", "x"])
    assert isinstance(result.exception, ValueError)
    assert "format: got 'x'" in str(result.exception)
