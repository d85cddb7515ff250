"""Folders of files that belong together: written at once, listed with digests, checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replaced_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` if the block ends without an error.

    The file named `last` moves last: it tells the others' digests, so a mixture is noticed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".export.", dir=folder))
    try:
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_index(
    folder: Path, name: str, kind: str, fields: Sequence[str], writer: str, verify: bool
) -> dict[str, Any]:
    """Read the JSON that lists a folder's files, and see that they are those.

    Parameters
    ----------
    folder
        Has it.
    name, kind
        Of the JSON; what its ``format`` has to be.
    fields
        What it must have.
    writer
        The command that writes such folders.
    verify
        Read every file to the end and compare its digest; otherwise only the sizes.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_manifest`.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {writer} writes it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not valid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else data
        raise ValueError(f"{path}: format {found!r}, expected {kind!r}")
    if missing := [field for field in fields if field not in data]:
        raise ValueError(f"{path}: lacks {missing}")
    for file, wanted in data["files"].items():
        check_file(folder / file, wanted, name, verify)
    return data


def check_file(path: Path, wanted: dict[str, Any], manifest: str, verify: bool) -> None:
    """See that a file has the size, and if `verify` the digest, that a manifest says.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, or another file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, though {manifest} names it")
    size = path.stat().st_size
    if size != wanted["bytes"]:
        word = "truncated" if size < wanted["bytes"] else "another file"
        raise ValueError(f"{path}: {word}: {size} bytes, but {manifest} says {wanted['bytes']}")
    if verify and digest(path) != wanted["sha256"]:
        raise ValueError(f"{path}: not the file that {manifest} was written for (SHA-256 differs)")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()
