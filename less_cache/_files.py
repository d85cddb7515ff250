"""Writing files so that a reader finds the old one or the new one, never half of one."""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OWNER = re.compile(r"(?P<host>[0-9a-z]+)-(?P<process>\d+)")
"""What `owner_tag` makes."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block ends without an error.

    What processes that were killed left behind under such names goes away, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if is_left_behind(left.name.removeprefix(f".{path.name}.")):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{owner_tag()}.{secrets.token_hex(4)}.part")
    # O_EXCL: nobody else's file; the mode is cut by the umask, as that of any new file.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
