"""Text for training and evaluation: files, folders, a `datasets` name or token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".csv", ".tex")
TOKEN_SUFFIX = ".npy"


def read_documents(source: str) -> list[tuple[str, str]]:
    """Names and texts of what `source` means.

    Parameters
    ----------
    source
        A text file; a folder, whose text files are taken in order of their paths; or
        ``datasets:NAME[:CONFIG[:SPLIT]]``, whose column ``text`` is taken.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If there is no text in it, or a file is not UTF-8.
    ImportError
        If `datasets` is asked for and not installed.
    """
    if source.startswith("datasets:"):
        documents = list(_read_dataset(source))
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
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise ValueError(
            f"data: {source!r} holds no text, expected at least one non-empty document"
        )
    return documents


def tokenize(documents: list[tuple[str, str]], tokenizer: Any) -> list[tuple[str, Tensor]]:
    """Names and token ids [n] of documents, without special tokens.

    Raises
    ------
    ValueError
        If there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("data: is text, which needs the model's tokenizer, and the model has none")
    return [
        (name, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
        for name, text in documents
    ]


def load_tokens(
    source: str, tokenizer: Any, *, length: int, vocabulary: int, sequences: int | None = None
) -> Tensor:
    """Sequences of equal length for training.

    Parameters
    ----------
    source
        As of `read_documents`, or an ``.npy`` file of token ids, [n] or [n, N].
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
        If the data is too short, empty, of another vocabulary or not there.
    """
    if source.endswith(TOKEN_SUFFIX):
        stream = _read_ids(Path(source)).flatten()
    else:
        stream = torch.cat([ids for _, ids in tokenize(read_documents(source), tokenizer)])
    return cut(stream, length=length, vocabulary=vocabulary, sequences=sequences)


def cut(stream: Tensor, *, length: int, vocabulary: int, sequences: int | None = None) -> Tensor:
    """Cut one stream of token ids [n] into sequences [m, length]; see `load_tokens`."""
    if stream.numel() and (int(stream.min()) < 0 or int(stream.max()) >= vocabulary):
        raise ValueError(
            f"data: token ids run from {int(stream.min())} to {int(stream.max())}, but the model's "
            f"vocabulary has {vocabulary}: expected 0 to {vocabulary - 1}"
        )
    available = stream.numel() // length
    wanted = sequences or 2
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


def _read_ids(path: Path) -> Tensor:
    if not path.exists():
        raise FileNotFoundError(f"data: {path} is not there")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"data: {path} is no .npy file of numbers: {error}") from None
    if ids.dtype.kind not in "iu":
        raise TypeError(f"data: {path} holds {ids.dtype}, expected integers: token ids")
    return torch.from_numpy(ids.astype(np.int64))


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: {error}") from None


def _read_dataset(source: str) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"data: {source!r} needs the package datasets: pip install datasets"
        ) from None
    name, config, split = [*source.split(":")[1:], "", ""][:3]
    rows = datasets.load_dataset(name, config or None, split=split or "train")
    for number, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"data: {source!r} has columns {sorted(row)}, expected one named text")
        yield f"{name}[{number}]", row["text"]
