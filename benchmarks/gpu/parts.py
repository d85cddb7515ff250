"""The parts of a first run: what each is called, runs, and needs."""

from __future__ import annotations

import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SKIPPED = 77
"""Exit status of a part that cannot run here; its last line on stderr says why."""

TAIL = 4000
"""Characters of a part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One part: a command, which may write its results to the file ``{json}``.

    Attributes
    ----------
    name, title
        For the command line and the page.
    command
        What to run in the repository's root.
    seconds
        After so long it is stopped, and has failed.
    needs
        Says why it cannot run here, or ``""``.
    """

    name: str
    title: str
    command: tuple[str, ...]
    seconds: int
    needs: Callable[[], str]


def no_card() -> str:
    """Why there is no card to run on; ``""`` if there is one."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    return ""


@functools.cache
def card_name() -> str:
    """The current card's."""
    return "no card" if no_card() else str(torch.cuda.get_device_name())


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    # Compilation is most of it: as many processes as cores.
    return _python("pytest", "-q", "-n", str(max(1, os.cpu_count() or 1)), *arguments)


PARTS = (
    Part(
        "capture",
        "A captured step replays",
        _python("pytest", "-q", "tests/backends/triton/test_decode.py", "-k", "captured"),
        300,
        no_card,
    ),
    Part(
        "tests",
        "The Triton backend's tests and the conformance suite, on the card",
        _pytest("tests/backends/triton", "tests/conformance", "-k", "triton or cuda"),
        1800,
        no_card,
    ),
    Part(
        "repeats",
        "One step many times from the same state gives the same bits",
        _python("benchmarks.gpu.repeats", "--json", "{json}"),
        900,
        no_card,
    ),
    Part(
        "shapes",
        "Real shapes in 16 bits against the torch backend in float32",
        _python("benchmarks.gpu.shapes", "--json", "{json}"),
        900,
        no_card,
    ),
    Part(
        "plugin",
        "The TensorRT plugin's kernels, without TensorRT; memcheck where it is installed",
        _python("benchmarks.gpu.plugin", "--json", "{json}"),
        1200,
        no_card,
    ),
    Part(
        "kernels",
        "Kernels apart, in graphs",
        _python("benchmarks.gpu.kernels", "--json", "{json}"),
        1800,
        no_card,
    ),
    Part(
        "decode",
        "Whole-model decode steps at 4096 tokens: full cache, rank 0, LESS",
        _python("benchmarks.gpu_decode", "--context", "4096", "--json", "{json}"),
        1800,
        no_card,
    ),
    Part(
        "generate",
        "generate() in a 7B model's shapes: kernels compiled, time of the host",
        _python("benchmarks.gpu.generate", "--json", "{json}"),
        900,
        no_card,
    ),
    Part(
        "captured",
        "A whole model's step as one CUDA graph: the uncaptured logits, and the time of both",
        _python("benchmarks.gpu.captured", "--json", "{json}"),
        900,
        no_card,
    ),
    Part(
        "prompt",
        "A prompt of 4096 tokens against flash attention",
        _python("benchmarks.gpu.prompt", "--json", "{json}"),
        600,
        no_card,
    ),
)


def run_part(part: Part) -> dict[str, Any]:
    """Run one part, and say what became of it: it raises nothing.

    Returns
    -------
    dict
        ``name``, ``title``, ``outcome`` ("passed", "failed" or "skipped"), ``reason``,
        ``seconds``, ``result`` (what the part wrote, or None) and ``output`` (its end).
    """
    found = {"name": part.name, "title": part.title, "seconds": 0.0, "result": None, "output": ""}
    if reason := part.needs():
        return {**found, "outcome": "skipped", "reason": reason}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [text.replace("{json}", str(path)) for text in part.command]
        status, output = _run(command, part.seconds)
        if path.is_file():
            found["result"] = json.loads(path.read_text())
    lines = [line for line in output.splitlines() if line.strip()]
    outcome = {0: "passed", SKIPPED: "skipped"}.get(status, "failed")
    reason = ""
    if status is None:
        reason = f"not done after {part.seconds} s"
    elif outcome != "passed":
        reason = lines[-1] if lines else f"exit status {status}"
    found |= {"seconds": time.monotonic() - started, "output": output[-TAIL:]}
    return {**found, "outcome": outcome, "reason": reason}


def _run(command: list[str], seconds: int) -> tuple[int | None, str]:
    """Exit status, None where time ran out, and what was printed."""
    # The interpreter's variable would keep the kernels from the card.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        # With all that it has started.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def environment() -> dict[str, Any]:
    """Versions, and what the card says of itself."""
    known = {found.name: found.version for found in metadata.distributions()}
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {name: known.get(name) for name in ("torch", "triton", "transformers", "numpy")}
    found: dict[str, Any] = {"versions": versions, "platform": platform.platform()}
    if not no_card():
        card = torch.cuda.get_device_properties(0)
        found["card"] = {
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
        }
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        with_tool = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        status, output = _run(with_tool, 60)
        found["nvidia_smi"] = {query: output.strip()} if status == 0 else None
    return found
