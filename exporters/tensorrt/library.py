"""What both building and running need of TensorRT: its log, and the plugin's library."""

from __future__ import annotations

from pathlib import Path

import tensorrt as trt

PLUGIN, PLUGIN_VERSION = "LessAttention", "1"


class Log(trt.ILogger):
    """Keeps TensorRT's errors for the exception that follows them.

    Parameters
    ----------
    verbose
        Print everything; otherwise only warnings and errors are kept, and nothing is printed.
    """

    def __init__(self, verbose: bool = False) -> None:
        # pybind11 wants its own constructor called by name.
        trt.ILogger.__init__(self)
        self.verbose = verbose
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if self.verbose:
            print(f"[TensorRT] {msg}")
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(msg)

    def taken(self) -> str:
        """The errors since the last call, in one line."""
        errors, self.errors = self.errors, []
        return "; ".join(errors) or "TensorRT gave no reason"


def load_plugin(path: Path) -> None:
    """Register the plugin of a shared library, once in a process.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If TensorRT cannot load it, or it does not have the plugin.
    """
    if not path.is_file():
        raise FileNotFoundError(f"plugin: {path}: no such file")
    registry = trt.get_plugin_registry()
    if registry.get_creator(PLUGIN, PLUGIN_VERSION, "") is not None:
        return
    handle = registry.load_library(str(path))
    if handle is None or registry.get_creator(PLUGIN, PLUGIN_VERSION, "") is None:
        raise ValueError(
            f"plugin: {path}: TensorRT {trt.__version__} finds no plugin {PLUGIN}, version "
            f"{PLUGIN_VERSION}, in it; it may have been built for another major version"
        )
