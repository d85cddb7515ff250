"""These tests need the packages of the extra `onnx`."""

from unittest import mock

import pytest

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


@pytest.fixture(scope="module")
def traced_once():
    """Exports of one module's tests that differ in what is written trace a model once."""
    from exporters.onnx import export

    trace, made = export.trace_decoder, {}

    def once(model, config, layers, maps, transforms, **named):
        key = (id(model), config, id(maps), id(transforms), *sorted(named.items()))
        if key not in made:
            # What has an id must live as long as it is looked up.
            graph = trace(model, config, layers, maps, transforms, **named)
            made[key] = (graph, model, maps, transforms)
        return made[key][0].clone()

    with mock.patch.object(export, "trace_decoder", once):
        yield
