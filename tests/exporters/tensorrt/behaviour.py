"""What the fake TensorRT does: it "builds" by remembering the graph, and runs it on the CPU.

An engine is the name of its ONNX file and its profile; `running` has what runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from .running import PLAN, Context, Engine, Runtime


class TensorRT:
    """What all objects of one fake module share.

    Attributes
    ----------
    plugins : set of (name, version)
        What is registered.
    libraries : dict
        By path: the plugins that loading it registers.
    fail_build : str
        If not empty, what a build fails with.
    on_step : callable
        Called at each step of a build.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.plugins: set[tuple[str, str]] = set()
        self.libraries: dict[str, set[tuple[str, str]]] = {}
        self.fail_build = ""
        self.on_step: Any = lambda: None

    def get_plugin_registry(self) -> Any:
        return self.make("IPluginRegistry")

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        return True

    def make(self, name: str, **attributes: Any) -> Any:
        """An object of a class that has no constructor in Python."""
        made = object.__new__(getattr(self.module, name))
        for key, value in {"_world": self, **attributes}.items():
            object.__setattr__(made, key, value)
        return made

    def buffer(self, data: bytes) -> Any:
        return self.module.IHostMemory(data)

    def error(self, logger: Any, text: str) -> None:
        logger.log(self.module.ILogger.Severity.ERROR, text)

    def dtype(self, kind: int) -> Any:
        names = {1: "FLOAT", 10: "HALF", 16: "BF16", 2: "UINT8", 3: "INT8"}
        names |= {6: "INT32", 7: "INT64"}
        return getattr(self.module.DataType, names[kind])


class Registry:
    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:  # noqa: A002
        found = (type, version) in self._world.plugins and plugin_namespace == ""
        return self._world.make("IPluginCreatorInterface") if found else None

    def load_library(self, plugin_path: str) -> Any:
        if plugin_path not in self._world.libraries:
            return None
        self._world.plugins |= self._world.libraries[plugin_path]
        return object()


class Builder:
    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, self._world.module.ILogger) or not hasattr(logger, "_world"):
            raise TypeError("logger: no ILogger")
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        strongly = self._world.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        assert flags == 1 << int(strongly)
        return self._world.make("INetworkDefinition")

    def create_builder_config(self) -> Any:
        return self._world.make("IBuilderConfig", _profiles=[], _preview=set())

    def create_optimization_profile(self) -> Any:
        return self._world.make("IOptimizationProfile", _shapes={})

    def get_plugin_registry(self) -> Any:
        return self._world.get_plugin_registry()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        world = self._world
        if world.fail_build:
            return world.error(self._logger, world.fail_build)
        graph = network._model.graph
        (profile,) = config._profiles
        for value in graph.input:
            dims = [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
            for shape in profile._shapes[value.name]:
                assert len(shape) == len(dims), value.name
                for given, wanted in zip(shape, dims, strict=True):
                    assert isinstance(wanted, str) or given == wanted, (value.name, shape, dims)
        assert set(profile._shapes) == {value.name for value in graph.input}
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 3)
        monitor.phase_start("Tactics", "Building Engine", 1)
        going_on = True
        for step in range(3):
            world.on_step()
            going_on = going_on and monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building Engine")
        if not going_on:
            return None
        aliased = world.module.PreviewFeature.ALIASED_PLUGIN_IO_10_03 in config._preview
        plan = {"graph": str(network._path), "shapes": profile._shapes, "aliased": aliased}
        return world.buffer(PLAN + json.dumps(plan).encode())


class Config:
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool in self._world.module.MemoryPoolType

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        assert feature in self._world.module.PreviewFeature
        self._preview.add(feature)

    def clear_flag(self, flag: Any) -> None:
        assert flag in self._world.module.BuilderFlag

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        data = bytes(serialized_timing_cache)
        if data and not data.startswith(b"times:"):
            return None
        return self._world.make("ITimingCache", _data=data or b"times:")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        object.__setattr__(self, "_cache", cache)
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class TimingCache:
    def serialize(self) -> Any:
        return self._world.buffer(self._data + b"one more,")


class Profile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._shapes[input] = (min, opt, max)


class Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._errors = network, []

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        proto = onnx.load(path, load_external_data=False)
        known = {name for name, _ in self._world.plugins}
        for node in proto.graph.node:
            if node.domain and node.op_type not in known:
                self._errors.append(self._world.make("ParserError", _node=node))
        object.__setattr__(self._network, "_path", path)
        object.__setattr__(self._network, "_model", proto)
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]


class ParserError:
    def node_operator(self) -> str:
        return self._node.op_type

    def node_name(self) -> str:
        return self._node.name

    def desc(self) -> str:
        return "no importer and no plugin"


class Buffer:
    """The fake's host memory is a subclass of bytes, which Python lets be a buffer."""

    as_buffer = True


BEHAVIOURS: dict[str, type] = {
    "Builder": Builder,
    "IBuilderConfig": Config,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
    "IHostMemory": Buffer,
    "IOptimizationProfile": Profile,
    "IPluginRegistry": Registry,
    "ITimingCache": TimingCache,
    "OnnxParser": Parser,
    "ParserError": ParserError,
    "Runtime": Runtime,
}
