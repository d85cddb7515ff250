"""ONNX: `export_decoder` writes a model with its cache, `OnnxDecoder` runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import export_decoder
    from .runtime import OnnxDecoder, OnnxState

__all__ = ["OnnxDecoder", "OnnxState", "export_decoder"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: running a model needs neither torch.onnx nor transformers."""
    if name == "export_decoder":
        from .export import export_decoder

        return export_decoder
    if name in ("OnnxDecoder", "OnnxState"):
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
