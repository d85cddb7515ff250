"""Text for training and evaluation: files, folders, a `datasets` name or token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._checks import check_int

Document: TypeAlias = "tuple[str, str | Tensor]"
"""A name, and a text or its token ids [n]."""

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".csv", ".tex")
TOKEN_SUFFIX = ".npy"


def read_documents(source: str) -> list[Document]:
    """Names and contents of what `source` means.

    Parameters
    ----------
    source
        A text file; a folder, whose text files are taken in order of their paths;
        ``datasets:NAME[:CONFIG[:SPLIT]]``, whose column ``text`` is taken; or an ``.npy`` file of
        token ids, one document [n] or a document a row [n, N].

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError, TypeError
        If there is nothing in it, or a file is not UTF-8, or holds no token ids.
    ImportError
        If `datasets` is asked for and not installed.
    """
    if not source:
        raise ValueError("data: got an empty name, expected a file, a folder or datasets:NAME")
    documents: list[Document]
    if source.startswith("datasets:"):
        documents = [*_read_dataset(source)]
    elif source.endswith(TOKEN_SUFFIX):
        documents = _read_ids(Path(source))
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"data: {source!r} is no file or folder (a data set is spelled datasets:NAME)"
            )
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES)
        documents = [(str(file), _read_file(file)) for file in files]
    documents = [
        (name, x) for name, x in documents if (x.strip() if isinstance(x, str) else len(x))
    ]
    if not documents:
        raise ValueError(
            f"data: {source!r} holds no text, expected at least one non-empty document"
        )
    logger.info("data: %s: %d documents", source, len(documents))
    return documents


def tokenize(
    documents: Sequence[Document], tokenizer: Any, *, vocabulary: int | None = None
) -> list[tuple[str, Tensor]]:
    """Names and token ids [n] of documents, without special tokens.

    Parameters
    ----------
    documents
        From `read_documents`.
    tokenizer
        The model's; not needed for token ids.
    vocabulary
        The model's number of tokens; where given, ids must lie below it.

    Raises
    ------
    ValueError, TypeError
        If text meets no tokenizer, an id lies outside the vocabulary, or something is no document.
    """
    found = []
    for document in documents:
        if not isinstance(document, (tuple, list)) or len(document) != 2:
            raise TypeError(
                f"documents: got an entry of type {type(document).__name__}, expected pairs of a "
                "name and a text or token ids"
            )
        name, content = document
        if isinstance(content, str):
            if tokenizer is None:
                raise ValueError(
                    "data: is text, which needs the model's tokenizer, and the model has none"
                )
            content = torch.tensor(
                tokenizer(content, add_special_tokens=False)["input_ids"], dtype=torch.int64
            )
        if vocabulary is not None:
            _check_vocabulary(content, vocabulary)
        found.append((name, content))
    return found


def load_tokens(
    source: str | Sequence[Document],
    tokenizer: Any,
    *,
    length: int,
    vocabulary: int,
    sequences: int | None = None,
) -> Tensor:
    """Sequences of equal length for training.

    Parameters
    ----------
    source
        As of `read_documents`, or what that made of it.
    tokenizer
        The model's; not needed for token ids.
    length
        N, tokens a sequence.
    vocabulary
        The model's number of tokens; ids must lie below it.
    sequences
        Take this many, spread evenly over the text. Default: all.

    Returns
    -------
    Tensor
        [n, N] int64.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        If the data is too short, empty, of another vocabulary or not there, or a number is none.
    """
    documents = read_documents(source) if isinstance(source, str) else source
    stream = torch.cat([ids for _, ids in tokenize(documents, tokenizer)])
    return cut(stream, length=length, vocabulary=vocabulary, sequences=sequences)


def cut(stream: Tensor, *, length: int, vocabulary: int, sequences: int | None = None) -> Tensor:
    """Cut one stream of token ids [n] into sequences [m, length]; see `load_tokens`."""
    check_int("length", length, minimum=2)
    if sequences is not None:
        check_int("sequences", sequences, minimum=1)
    _check_vocabulary(stream, vocabulary)
    available = stream.numel() // length
    wanted = 2 if sequences is None else sequences
    if available < wanted:
        raise ValueError(
            f"data: {stream.numel()} tokens make {available} sequences of {length}, "
            f"expected at least {wanted}"
        )
    whole = stream[: available * length].view(available, length)
    if sequences is None:
        return whole
    index = torch.linspace(0, available - 1, sequences).round().long()
    return whole[index]


def _check_vocabulary(ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise ValueError(
            f"data: token ids run from {int(ids.min())} to {int(ids.max())}, but the model's "
            f"vocabulary has {vocabulary}: expected 0 to {vocabulary - 1}"
        )


def _read_ids(path: Path) -> list[Document]:
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is no file")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"data: {path} is no .npy file of numbers: {error}") from None
    if ids.dtype.kind not in "iu":
        raise TypeError(f"data: {path} holds {ids.dtype}, expected integers: token ids")
    if ids.ndim not in (1, 2):
        raise ValueError(f"data: {path} has shape {ids.shape}, expected [n], or [n, N]")
    rows = torch.from_numpy(np.atleast_2d(ids).astype(np.int64))
    names = [str(path)] if ids.ndim == 1 else [f"{path}[{row}]" for row in range(len(rows))]
    return [*zip(names, rows, strict=True)]


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"data: {path} cannot be read: {error.strerror}") from None


def _read_dataset(source: str) -> Iterator[tuple[str, str]]:
    name, config, split = [*source.split(":")[1:], "", "", ""][:3]
    if not name:
        raise ValueError(f"data: got {source!r}, expected datasets:NAME[:CONFIG[:SPLIT]]")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"data: {source!r} needs the package datasets: install less_cache[train]"
        ) from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # Network, hub, scripts: whatever it is, the name led to it.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"data: {source!r} cannot be loaded: {reason}") from error
    for number, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"data: {source!r} has columns {sorted(row)}, expected one named text")
        yield f"{name}[{number}]", row["text"]
