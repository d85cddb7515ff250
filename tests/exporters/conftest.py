"""These tests need the packages of the extra `onnx`."""

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
