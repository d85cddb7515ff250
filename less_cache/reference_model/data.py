"""The text the reference model is trained and judged on: CPython's own standard library.

Training text is read from the running interpreter's library, which must be the version that
`data_manifest.json` lists file by file.  The held-out documents are shipped beside this file, so
that evaluation needs no particular Python.
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PYTHON_VERSION = "3.11.7"
MANIFEST = Path(__file__).parent / "data_manifest.json"
HELD_OUT_FOLDER = Path(__file__).parent / "held_out"

#: Modules and packages the model never sees, neither their sources nor their tests.
HELD_OUT_MODULES = (
    "argparse",
    "bdb",
    "calendar",
    "cmd",
    "concurrent",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "gettext",
    "heapq",
    "ipaddress",
    "mailbox",
    "optparse",
    "pdb",
    "plistlib",
    "pprint",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
    "tomllib",
    "uuid",
    "webbrowser",
    "wsgiref",
    "zipfile",
    "zoneinfo",
)

#: Tests of held-out modules that go by another name, and files that repeat held-out text.
HELD_OUT_ELSEWHERE = (
    "test/test_concurrent_futures",
    "test/test_zipfile64",
)

#: A held-out file becomes a document if it is at least this long (about 3000 tokens).
DOCUMENT_MIN_BYTES = 12_000

# Generated, foreign, deliberately broken or specific to one build: nothing to learn Python from.
_EXCLUDED = re.compile(
    r"(^|/)(site-packages|__pycache__|lib-dynload|pydoc_data|encoded_modules|crashers|tokenizedata)/"
    r"|^config-|^_sysconfigdata|^lib2to3/tests/data/|^html/entities\.py$|^this\.py$"
    r"|(^|/)bad_?syntax|(^|/)badcert|^idlelib/idle_test/example_"
)
_GENERATED_TABLE = "decoding_table = ("


@dataclass(frozen=True)
class Document:
    """One long text: a module, or a package's modules one after another, with their tests.

    Attributes
    ----------
    name : str
        What it is called: the module's name, or the file's path for a held-out file.
    text : str
        The text.
    """

    name: str
    text: str


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _stem(part: str) -> str:
    return part.removesuffix(".py")


def is_held_out(file: str) -> bool:
    """Tell whether a library file belongs to the held-out set.

    Parameters
    ----------
    file : str
        Path inside the standard library, with forward slashes.
    """
    parts = file.split("/")
    first = _stem(parts[0])
    if first in HELD_OUT_MODULES:
        return True
    if first == "test" and any(
        _stem(p).removeprefix("test_") in HELD_OUT_MODULES for p in parts[1:]
    ):
        return True
    return any(file.startswith(prefix) for prefix in HELD_OUT_ELSEWHERE)


def library_files(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield path and text of every usable file of the library, training and held-out alike.

    Parameters
    ----------
    root : Path, optional
        Library folder; by default the running interpreter's.
    """
    root = root or standard_library()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        file = path.relative_to(root).as_posix()
        if _EXCLUDED.search(file):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and _GENERATED_TABLE not in text:
            yield file, text


def sha256(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _group(file: str) -> str:
    """Name the document a training file goes to: a module and its tests stay together."""
    parts = file.split("/")
    if parts[0] != "test":
        return _stem(parts[0])
    if parts[1] == "support":
        return "test.support"
    return _stem(parts[1]).removeprefix("test_")


def training_files() -> dict[str, str]:
    """Return the training files' texts by path, checked against the manifest.

    Raises
    ------
    RuntimeError
        If the running interpreter's library is not the one the model was trained on.
    """
    files = {f: text for f, text in library_files() if not is_held_out(f)}
    expected: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))["training"]
    missing = sorted(expected.keys() - files.keys())
    extra = sorted(files.keys() - expected.keys())
    changed = sorted(f for f in expected.keys() & files.keys() if sha256(files[f]) != expected[f])
    if missing or extra or changed:
        first = (missing + extra + changed)[0]
        raise RuntimeError(
            f"the standard library in {standard_library()} is not that of CPython "
            f"{PYTHON_VERSION}: {len(missing)} files are missing, {len(extra)} unexpected, "
            f"{len(changed)} different (first: {first}); train with CPython {PYTHON_VERSION}, "
            "installed with its tests"
        )
    return files


def training_documents() -> list[Document]:
    """Return the training text as long documents, in a fixed order.

    A package's files follow one another, its tests after them, so that a window of the context's
    length finds the definitions its text refers to.
    """
    groups: dict[str, list[tuple[bool, str, str]]] = {}
    for file, text in training_files().items():
        is_test = file.startswith("test/")
        groups.setdefault(_group(file), []).append((is_test, file, text))
    return [
        Document(name, "\n\n".join(text for _, _, text in sorted(files)))
        for name, files in sorted(groups.items())
    ]


def held_out_documents() -> list[Document]:
    """Return the shipped held-out documents, each one long source file.

    Raises
    ------
    RuntimeError
        If a shipped file differs from the manifest.
    """
    expected: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))["held_out"]
    documents = []
    for file, digest in expected.items():
        shipped = HELD_OUT_FOLDER / f"{file.replace('/', '.')}.txt"
        text = shipped.read_bytes().decode("utf-8")
        if sha256(text) != digest:
            raise RuntimeError(f"{shipped.name} is not the file the manifest lists")
        documents.append(Document(file, text))
    return documents


def write_data_files() -> None:
    """Write the manifest and the shipped held-out documents from the running library."""
    training, held_out = {}, {}
    HELD_OUT_FOLDER.mkdir(exist_ok=True)
    for file, text in library_files():
        if not is_held_out(file):
            training[file] = sha256(text)
        elif not file.startswith("test/") and len(text.encode("utf-8")) >= DOCUMENT_MIN_BYTES:
            held_out[file] = sha256(text)
            shipped = HELD_OUT_FOLDER / f"{file.replace('/', '.')}.txt"
            shipped.write_bytes(text.encode("utf-8"))
    record = {"python": PYTHON_VERSION, "held_out": held_out, "training": training}
    MANIFEST.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")
