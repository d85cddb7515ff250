"""Writing files so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OWNER = re.compile(r"(?P<host>[0-9a-z]+)-(?P<process>\d+)")
"""What `owner_tag` makes."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` if the block ends without an error.

    It lies in a folder of its own beside `path`, so that what a library writes next to it, too,
    goes away with it, or after a kill with the next write of that name.
    """
    # A name may be as long as the system takes: its beginning tells enough.
    with scratch_folder(path.parent, f".{path.name[:40]}.") as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Libraries make files that only their owner may read; this one is as any new file.
        temporary.chmod(mode)
        temporary.replace(path)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder of this process alone inside `parent`, gone in the end.

    What processes that were killed left behind under such names goes away, too.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        if is_left_behind(left.name.removeprefix(prefix)):
            _remove(left)
    scratch = Path(tempfile.mkdtemp(prefix=f"{prefix}{owner_tag()}.", suffix=".part", dir=parent))
    try:
        yield scratch
    finally:
        _remove(scratch)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def owner_tag() -> str:
    """The part of a temporary name that says which machine and process made it."""
    return f"{_host()}-{os.getpid()}"


def is_left_behind(name: str) -> bool:
    """Whether a name that begins with an `owner_tag` is that of a dead process of this machine."""
    owner = OWNER.match(name)
    # Elsewhere than on POSIX there is no harmless way to ask after a process.
    if owner is None or owner["host"] != _host() or os.name != "posix":
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` by way of a temporary name."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(data: Any, *, indent: int | None = None) -> str:
    """`data` as JSON; numbers that JSON does not have, NaN and infinity, become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def json_digest(data: Any) -> str:
    """SHA-256 of `data` as `json_text` writes it, in hexadecimal."""
    return hashlib.sha256(json_text(data).encode()).hexdigest()


def parse_json(where: str, text: str | bytes) -> Any:
    """What a JSON text says.

    Raises
    ------
    ValueError
        If it is none, or nested so deeply that reading it would take the stack.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: its JSON is nested too deeply") from None


def _host() -> str:
    return re.sub(r"[^0-9a-z]", "", platform.node().lower()) or "localhost"


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
