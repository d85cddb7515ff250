"""TensorRT: `build_engines` builds an exported model, `TensorRTDecoder` runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.common.sampling import Sampler

    from .build import build_engines, describe_engines
    from .graphs import derive_graphs
    from .runtime import TensorRTDecoder
    from .state import TensorRTState

__all__ = [
    "Sampler",
    "TensorRTDecoder",
    "TensorRTState",
    "build_engines",
    "derive_graphs",
    "describe_engines",
]

_MODULES = {
    "Sampler": "exporters.common.sampling",
    "TensorRTDecoder": ".runtime",
    "TensorRTState": ".state",
    "build_engines": ".build",
    "derive_graphs": ".graphs",
    "describe_engines": ".build",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: graphs are derived without TensorRT, and run without onnx."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_MODULES[name], __name__)
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise
        raise ImportError("TensorRT is needed; install less_cache[tensorrt]") from None
    return getattr(module, name)
