"""Folders of files that belong together: put in place at once, listed with digests, checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from less_cache._files import scratch_folder

from .fields import check_fields

SCRATCH = ".export."
"""How the names of temporary folders begin."""


@contextlib.contextmanager
def replaced_files(folder: Path, last: str, gone: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder whose contents move into `folder` if the block ends without an error.

    A new folder appears whole. In one that is there, each file and each subfolder is replaced by
    itself. The file named `last` moves last: it lists the others' digests, so that a reader
    notices a mixture. Old files named in `gone` are removed unless there is a new one.
    """
    existed = folder.exists()
    with scratch_folder(folder if existed else folder.parent, SCRATCH) as room:
        new, old = room / "new", room / "old"
        new.mkdir()
        old.mkdir()
        yield new
        if existed:
            for name in gone:
                if not (new / name).exists() and (folder / name).is_file():
                    (folder / name).unlink()
            for path in sorted(new.iterdir(), key=lambda path: path.name == last):
                _replace(path, folder / path.name, old / path.name)
        else:
            new.replace(folder)


def _replace(path: Path, target: Path, aside: Path) -> None:
    """Move a file or a folder to where another may be; an old folder goes aside first."""
    if target.is_dir() or (path.is_dir() and target.exists()):
        target.replace(aside)
    path.replace(target)


def check_target(folder: Path, indices: Sequence[str], force: bool) -> None:
    """Refuse to write into a folder that holds something else than an earlier export.

    Parameters
    ----------
    folder
        Where files will go; need not exist.
    indices
        Names of files, one of which every earlier export has.
    force
        Take any folder.

    Raises
    ------
    ValueError
        If it is a file, or is not empty and holds none of `indices`.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"out_dir: {folder} is a file, expected a folder")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(SCRATCH)}
    if names and not force and names.isdisjoint(indices):
        raise ValueError(
            f"out_dir: {folder} is not empty and holds no earlier export; name another folder, or "
            "overwrite files in this one with force=True (--force)"
        )


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each file in a folder and its subfolders, by its path from the folder."""
    return {
        path.relative_to(folder).as_posix(): described(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def described(path: Path) -> dict[str, Any]:
    """A file's size and digest, as an index has them."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def read_index(
    folder: Path, name: str, kind: str, fields: Mapping[str, Any], writer: str
) -> dict[str, Any]:
    """Read the JSON that lists a folder's files.

    Parameters
    ----------
    folder
        The folder with the JSON.
    name, kind
        The JSON's name, and what its ``format`` has to be.
    fields
        What it must have, as `check_fields` takes it.
    writer
        The command that writes such folders.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If it is damaged, of another format, or lacks a field.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {writer} writes it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: its JSON is nested too deeply") from None
    if not isinstance(data, dict) or data.get("format") != kind:
        found = data.get("format") if isinstance(data, dict) else data
        raise ValueError(f"{path}: format: got {str(found)[:80]!r}, expected {kind!r}")
    check_fields(str(path), data, {"files": dict, **fields})
    return data


def check_files(folder: Path, name: str, files: Any, wanted: Sequence[str], verify: bool) -> None:
    """Check that a folder holds the files that its index lists, and that it lists those `wanted`.

    Parameters
    ----------
    folder
        The folder with the files.
    name
        The index's name.
    files
        Its field ``files``: size and digest of each file, by its path from the folder.
    wanted
        Files that must be listed.
    verify
        Read every file to the end and compare its digest; otherwise only the sizes.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If a listed file lies outside the folder, a wanted one is not listed, or one is truncated
        or another file.
    """
    path = folder / name
    for file, entry in files.items():
        if not is_inside(file):
            raise ValueError(f"{path}: files: got {file!r}, expected files inside the folder")
        check_fields(f"{path}: files[{file!r}]", entry, {"bytes": int, "sha256": str})
    if missing := [file for file in wanted if file not in files]:
        raise ValueError(f"{path}: files: lacks {missing}")
    for file, entry in files.items():
        check_file(folder / file, entry, name, verify)


def is_inside(name: str) -> bool:
    """Whether a path, as an index has it, leads to something inside the index's folder."""
    path = PurePosixPath(name)
    odd = set(name) & set("\\:\0")
    return bool(path.parts) and ".." not in path.parts and not path.is_absolute() and not odd


def check_file(path: Path, wanted: Mapping[str, Any], manifest: str, verify: bool) -> None:
    """Check that a file has the size, and if `verify` the digest, that a manifest says.

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
