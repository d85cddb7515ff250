"""Runs of Python with a compiler, whatever the tests themselves run under."""

import os
import subprocess
import sys


def run(arguments, folder, **environment):
    # The interpreter has no compiler, and a cache of earlier runs would compile nothing.
    inherited = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited |= {"TRITON_CACHE_DIR": str(folder / "cache"), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=inherited, capture_output=True, text=True, check=False)
