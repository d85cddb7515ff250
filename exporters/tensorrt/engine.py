"""An engine read from its file, and calls of it with tensors bound by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tensorrt as trt
import torch
from torch import Tensor

from exporters.common.manifest import Manifest

from .library import Log

TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}


class Engine:
    """An engine, ready to be called.

    Parameters
    ----------
    runtime
        ``tensorrt.Runtime``; must outlive the engine, which holds it.
    log
        The runtime's.
    path
        The engine's file.

    Raises
    ------
    ValueError
        If TensorRT cannot read it.
    """

    def __init__(self, runtime: trt.Runtime, log: Log, path: Path) -> None:
        self._runtime, self._log, self.path = runtime, log, path
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ValueError(f"{path}: TensorRT cannot read it: {log.taken()}")
        self._engine = engine

    def check(self, manifest: Manifest, code_dtype: str = "uint8") -> None:
        """Check that inputs and outputs are those of the exported model.

        Parameters
        ----------
        manifest
            The model's.
        code_dtype
            What bytes of codes are: the plugin takes them as int8.

        Raises
        ------
        ValueError
            If a tensor is missing or unknown, or of another type.
        """
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        wanted = [*manifest.data["inputs"], *manifest.data["outputs"]]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f"{self.path}: lacks the tensors {missing}")
        if unknown := [name for name in names if name not in wanted]:
            raise ValueError(
                f"{self.path}: has the tensors {unknown}, which the model does not have"
            )
        types = {
            "float32": trt.DataType.FLOAT,
            "float16": trt.DataType.HALF,
            "bfloat16": trt.DataType.BF16,
            "uint8": trt.DataType.UINT8,
            "int8": trt.DataType.INT8,
            "int32": trt.DataType.INT32,
            "int64": trt.DataType.INT64,
        }
        expected = dict.fromkeys(("input_ids", "attention_mask"), "int64")
        expected["logits"] = manifest.config.dtype
        for spec in manifest.state:
            dtype = code_dtype if spec.dtype == "uint8" else spec.dtype
            expected |= dict.fromkeys((f"past.{spec.name}", f"present.{spec.name}"), dtype)
        for name, dtype in expected.items():
            if engine.get_tensor_dtype(name) != types[dtype]:
                raise ValueError(
                    f"{self.path}: {name} is {engine.get_tensor_dtype(name)}, expected {dtype}"
                )

    def call(self) -> Call:
        """A new call, with memory of its own for intermediate results.

        Raises
        ------
        RuntimeError
            If the GPU has no room for it.
        """
        context = self._engine.create_execution_context()
        if context is None:
            raise RuntimeError(f"{self.path}: no execution context: {self._log.taken()}")
        return Call(self.path, context, self._log)


class Call:
    """An engine's execution context; `Engine.call` makes one."""

    def __init__(self, path: Path, context: trt.IExecutionContext, log: Log) -> None:
        self._path, self._context, self._log = path, context, log

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Tell the engine where the tensors are; they must stay there.

        Raises
        ------
        ValueError
            If TensorRT refuses a shape or an address.
        """
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(
                    f"{self._path}: {name} of shape {tuple(tensor.shape)} is not what the engine "
                    f"was built for: {self._log.taken()}"
                )
        for name, tensor in (*inputs.items(), *outputs.items()):
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise ValueError(f"{self._path}: {name} cannot be bound: {self._log.taken()}")

    def run(self, stream: int) -> None:
        """Launch the engine's work on a stream.

        Raises
        ------
        RuntimeError
            If TensorRT refuses.
        """
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"{self._path}: TensorRT cannot run it: {self._log.taken()}")
