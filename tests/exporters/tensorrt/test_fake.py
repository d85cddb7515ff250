"""The fake has the names that TensorRT has, and no others; and the stub says the same."""

import json

import pytest

from .stub import API, STUB, stub


def test_the_stub_is_that_of_the_names():
    assert STUB.read_text() == stub(json.loads(API.read_text()))


def test_names_that_tensorrt_has_not_are_errors(trt):
    logger = trt.Logger()
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    for wrong in (
        lambda: trt.NoSuchClass,
        lambda: trt.BuilderFlag.NO_SUCH_FLAG,
        lambda: builder.create_networks(),
        lambda: setattr(config, "no_such_property", 1),
        lambda: setattr(config, "num_optimization_profiles", 1),
    ):
        with pytest.raises(AttributeError):
            wrong()
    for wrong in (
        lambda: builder.create_network(flag=1),
        lambda: builder.create_optimization_profile(1),
        lambda: config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03),
        lambda: trt.Builder(),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_a_subclass_has_to_call_the_constructor(trt):
    class Careless(trt.ILogger):
        def __init__(self):
            pass

    with pytest.raises(TypeError):
        trt.Builder(Careless())


def test_calls_are_recorded_by_name(trt):
    builder = trt.Builder(trt.Logger(trt.ILogger.Severity.ERROR))
    builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert [(c.owner, c.method, list(c.arguments)) for c in trt.calls] == [
        ("Logger", "__init__", ["min_severity"]),
        ("Builder", "__init__", ["logger"]),
        ("Builder", "create_network", ["flags"]),
    ]
