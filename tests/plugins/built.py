"""What of the TensorRT plugin is built on this machine."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "plugins" / "trt" / "build", ROOT / "build")


@functools.cache
def built(name: str) -> Path:
    """The newest file of that name in the build folders; skips the test without one."""
    found = [path for folder in FOLDERS for path in folder.glob(f"**/{name}")]
    found.sort(key=lambda path: path.stat().st_mtime)
    # The sanitizers' libraries load only into programs that were built with them.
    found = [path for path in found if "sanitized" not in str(path.relative_to(ROOT))]
    if not found:
        pytest.skip(f"{name} is not built: see plugins/trt/README.md")
    return found[-1]
