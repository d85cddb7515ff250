"""What an export leaves in its folder: tokenizers, earlier exports, files of others."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from exporters.common.manifest import MANIFEST
from exporters.onnx import OnnxDecoder, export_decoder
from exporters.onnx.export import GENAI_CONFIG
from exporters.onnx.genai import export_genai
from less_cache.cli import app
from tests.integrations.models import build, less

TEMPLATES = "additional_chat_templates"


@pytest.fixture(scope="module")
def parts():
    model = build("llama", num_hidden_layers=1)
    return model, *less(model, capacity=8)


def tokenizer(**templates):
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    made.chat_template = templates
    return made


@pytest.mark.parametrize("write", [export_decoder, export_genai])
def test_a_tokenizer_with_several_chat_templates(parts, tmp_path, write):
    out = tmp_path / "out"
    for tool in ("first", "second"):
        write(*parts, out, tokenizer=tokenizer(default="plain", tool_use=tool))
        assert (out / TEMPLATES / "tool_use.jinja").read_text() == tool
    read = PreTrainedTokenizerFast.from_pretrained(out)
    assert read.chat_template == {"default": "plain", "tool_use": "second"}
    if write is export_decoder:
        files = json.loads((out / MANIFEST).read_text())["files"]
        assert f"{TEMPLATES}/tool_use.jinja" in files
        OnnxDecoder(out, threads=1)


def test_nothing_of_an_earlier_export_is_left(parts, tmp_path):
    out = tmp_path / "out"
    export_decoder(*parts, out, tokenizer=tokenizer(default="plain", tool_use="tool"))
    (out / "notes.txt").write_text("mine")
    export_genai(*parts, out)
    names = {path.name for path in out.rglob("*") if path.is_file()}
    assert "notes.txt" in names
    assert GENAI_CONFIG in names
    assert not names & {MANIFEST, "tokenizer.json", "chat_template.jinja", "tool_use.jinja"}
    export_decoder(*parts, out)
    assert not (out / GENAI_CONFIG).exists()
    OnnxDecoder(out, threads=1).append(OnnxDecoder(out).new_state(1), np.array([[3]]))


@pytest.mark.parametrize("write", [export_decoder, export_genai])
def test_a_folder_of_something_else_is_refused_unless_forced(parts, tmp_path, write):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no earlier export"):
        write(*parts, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 1
    write(*parts, tmp_path, force=True)
    assert (tmp_path / "config.json").read_text() != "{}"
    write(*parts, tmp_path)


def test_the_command_line_refuses_too(parts, tmp_path_factory):
    model, tmp_path = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    parts[0].save_pretrained(model)
    (tmp_path / "mine").write_text("")
    line = ["export", "onnx", "--out", str(tmp_path), "--model", str(model), "--capacity", "8"]
    refused = CliRunner().invoke(app, line)
    assert "holds no earlier export" in str(refused.exception)
    assert CliRunner().invoke(app, [*line, "--force"]).exit_code == 0
