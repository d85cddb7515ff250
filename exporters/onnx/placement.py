"""Where a session's tensors live: on the CPU, or on the GPU that its provider uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

ON_GPU = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


@dataclass(frozen=True)
class Placement:
    """A device by ONNX Runtime's name for it."""

    device: str = "cpu"
    index: int = 0

    @classmethod
    def of(cls, session: ort.InferenceSession) -> Placement:
        """Where the first of a session's providers computes."""
        first = session.get_providers()[0]
        if first not in ON_GPU:
            return cls()
        options = session.get_provider_options().get(first, {})
        return cls("cuda", int(options.get("device_id", 0)))

    def put(self, array: np.ndarray) -> ort.OrtValue:
        """A copy of `array` there."""
        # An OrtValue over NumPy's memory would not outlive the array; this one owns its memory.
        value = self.empty(array.shape, array.dtype)
        value.update_inplace(np.ascontiguousarray(array))
        return value

    def empty(self, shape: Sequence[int], dtype: Any) -> ort.OrtValue:
        """A tensor there, its contents undefined."""
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), np.dtype(dtype), self.device, self.index
        )


def check_providers(providers: Sequence[Any] | None) -> list[Any]:
    """The providers to ask for: those given; else CUDA, if this build has it, and the CPU.

    Raises
    ------
    ValueError
        If one is not in this build of ONNX Runtime.
    """
    available = ort.get_available_providers()
    if providers is None:
        preferred = ("CUDAExecutionProvider", "CPUExecutionProvider")
        return [name for name in preferred if name in available]
    if not providers:
        raise ValueError(f"providers: got none, expected some of {available}")
    for entry in providers:
        name = entry if isinstance(entry, str) else entry[0]
        if name not in available:
            raise ValueError(f"providers: got {name!r}, but this ONNX Runtime has {available}")
    return list(providers)
