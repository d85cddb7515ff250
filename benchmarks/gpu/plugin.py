"""The plugin's kernels on a card, through the harness that plays TensorRT.

`make plugin TENSORRT_ROOT=...` builds the harness, on any machine; it needs TensorRT's headers, and
at run time neither TensorRT nor Python.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .parts import ROOT, SKIPPED
from .scenes import write

FOLDERS = (ROOT / "plugins" / "trt" / "build", ROOT / "build")
MEMCHECK_CASES = 12
"""Under memcheck each takes seconds."""


def newest(name: str) -> Path | None:
    """The newest file of that name in the build folders, but for the sanitizers' builds."""
    found = [path for folder in FOLDERS for path in folder.glob(f"**/{name}")]
    found = [path for path in found if "sanitized" not in str(path.relative_to(ROOT))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def dumped(folder: Path) -> Path:
    """Cases with what the reference makes of them."""
    command = [sys.executable, "-m", "tests.plugins.dump_cases", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def judged(command: list[str], what: str) -> dict[str, Any]:
    """Run the harness, and count what it says of its cases."""
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    print(found.stdout[-4000:], found.stderr[-2000:], flush=True)
    lines = found.stdout.splitlines()
    failed = sum(line.startswith("FAILED") for line in lines)
    return {"what": what, "exit status": found.returncode, "lines": len(lines), "failed": failed}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Fail if a case fails; skip if nothing is built."""
    harness, library = newest("gpu_cases"), newest("libless_cache_trt.so")
    if harness is None or library is None:
        print("not built: run `make plugin TENSORRT_ROOT=...` first; headers are enough")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory() as folder:
        cases = dumped(Path(folder) / "cases")
        rows = [judged([str(harness), str(library), str(cases)], "gpu_cases")]
        if tool := shutil.which("compute-sanitizer"):
            few = Path(folder) / "few"
            shutil.copytree(cases, few)
            index = (cases / "index.tsv").read_text().splitlines(keepends=True)
            step = max(1, len(index) // MEMCHECK_CASES)
            (few / "index.tsv").write_text("".join(index[::step]))
            command = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
            rows.append(judged([*command, str(harness), str(library), str(few)], "memcheck"))
    write(json_file, rows)
    statuses = [row["exit status"] for row in rows]
    if statuses[0] == SKIPPED:
        print("the library has no kernels for this card")
        sys.exit(SKIPPED)
    sys.exit(int(any(statuses)))


if __name__ == "__main__":
    typer.run(main)
