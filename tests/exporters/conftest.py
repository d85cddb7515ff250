"""These tests need the packages of the extra `onnx`."""

from unittest import mock

import pytest

from less_cache.training.runs import model_digest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """`CodedParts` by their names; each is exported once."""
    from tests.exporters.exported import CodedParts

    made = {}

    def make(name):
        if name not in made:
            made[name] = CodedParts(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session", autouse=True)
def traced_once():
    """Exports of the same model and cache trace it once, which takes most of their time.

    Gives what was traced: a test that needs a trace of its own clears it.
    """
    from exporters.onnx import export

    trace, made = export.trace_decoder, {}

    def once(model, config, layers, maps, transforms, **named):
        parts = (None if part is None else part.digest for part in (maps, transforms))
        key = (model_digest(model), model.config.to_json_string(), config, *parts, *named.items())
        if key not in made:
            made[key] = trace(model, config, layers, maps, transforms, **named)
        return made[key].clone()

    with mock.patch.object(export, "trace_decoder", once):
        yield made
