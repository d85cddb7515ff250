"""ONNX: `export_decoder` writes a model with its cache, `OnnxDecoder` runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.common.sampling import Sampler

    from .export import export_decoder
    from .runtime import OnnxDecoder
    from .state import OnnxState

__all__ = ["OnnxDecoder", "OnnxState", "Sampler", "export_decoder"]

_MODULES = {
    "OnnxDecoder": ".runtime",
    "OnnxState": ".state",
    "Sampler": "exporters.common.sampling",
    "export_decoder": ".export",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: running a model needs neither onnx nor transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
