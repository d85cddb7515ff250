"""Where, when and with which versions something was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def surroundings() -> dict[str, Any]:
    """Command, date, machine and versions, as JSON-ready data."""
    return {
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "less_cache": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }


def command() -> str:
    """The command line, with the program's name alone: paths of a machine help nobody else."""
    program, *arguments = sys.argv
    words = [Path(program).name]
    module = sys.modules["__main__"].__spec__
    if module is not None:
        words = ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*words, *arguments])


def cpu_name() -> str:
    """The processor's name, as well as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
