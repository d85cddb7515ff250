"""The data of the paper's tables, by name or from a file: documents, articles with summaries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import parse_json
from ..training.data import read_documents
from .paper import Table
from .word_perplexity import count_words, without_wikitext_marks

READY = ("article", "summary_gt")
"""Columns of files whose articles are whole prompts, as the paper's code has them."""
PAIRS = (("article", "highlights"), ("document", "summary"), ("article", "summary"))


@dataclass(frozen=True)
class Text:
    """A document.

    Parameters
    ----------
    text
        As the model reads it.
    words
        As the data set counts them.
    """

    text: str
    words: int


@dataclass(frozen=True)
class Article:
    """What is to be summarised.

    Parameters
    ----------
    prompt
        Examples, the article, and what is asked for.
    summary
        The reference.
    """

    prompt: str
    summary: str


def texts_of(table: Table, source: str | None, limit: int | None) -> list[Text]:
    """The documents of a table.

    Parameters
    ----------
    table
        Of kind ``"perplexity"``.
    source
        A text file, a folder of them, or a ``.jsonl`` file with a column ``page`` or ``text``;
        ``None``: the table's own data, by way of `datasets`.
    limit
        The first so many.

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        If there are none.
    """
    found: Iterator[str]
    if source is None:
        found = (str(_cell(row, table.columns)) for row in _dataset_rows(table))
    elif source.endswith(".jsonl"):
        found = (str(_cell(row, ("page", "text"))) for row in _lines(source))
    else:
        found = (text for _, text in read_documents(source) if isinstance(text, str))
    texts = [text for text in itertools.islice(found, limit) if text.strip()]
    if not texts:
        raise ValueError(f"data: {source or table.data[0]!r} holds no text, expected a document")
    if table.name == "wikitext":
        return [Text(without_wikitext_marks(text), count_words(text)) for text in texts]
    return [Text(text, count_words(text)) for text in texts]


def articles_of(
    table: Table, source: str | None, limit: int | None, shots: int | None
) -> list[Article]:
    """The articles of a table, with their prompts.

    Parameters
    ----------
    table
        Of kind ``"summary"``.
    source
        A ``.jsonl`` file: with ``article`` and ``summary_gt``, as the paper's code has them, whose
        articles are whole prompts; or with ``article`` or ``document``, and ``highlights`` or
        ``summary``, whose first lines become the examples. ``None``: the table's own data, by way
        of `datasets`, with examples from its training split.
    limit
        The first so many.
    shots
        Examples before an article; ``None``: the table's number.

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        If there are none.
    """
    shots = table.shots if shots is None else shots
    if source is None:
        rows = _dataset_rows(table)
        examples = [*itertools.islice(_dataset_rows(table, "train"), shots)] if shots else []
    else:
        if not source.endswith(".jsonl"):
            raise ValueError(f"data: got {source!r}, expected a .jsonl file of articles")
        rows = _lines(source)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"data: {source!r} holds no lines, expected articles")
        rows = itertools.chain([first], rows)
        if set(READY) <= set(first):
            ready = (Article(str(row[READY[0]]), str(row[READY[1]])) for row in rows)
            return [*itertools.islice(ready, limit)]
        examples = [*itertools.islice(rows, shots)]
    begin = "".join(_shown(row, table.sentences) for row in examples)
    found = []
    for row in itertools.islice(rows, limit):
        article, summary = _pair(row)
        found.append(Article(begin + _asked(article, table.sentences), summary.strip()))
    if not found:
        raise ValueError(
            f"data: {source or table.data[0]!r} holds no articles past {shots} examples"
        )
    return found


def _asked(article: str, sentences: int) -> str:
    many = "sentence" if sentences == 1 else "sentences"
    return (
        f"###\nArticle: {article.strip()}\n\nSummarize the above article in {sentences} {many}.\n"
    )


def _shown(row: Mapping[str, Any], sentences: int) -> str:
    article, summary = _pair(row)
    return f"{_asked(article, sentences)}{summary.strip()}\n\n"


def _pair(row: Mapping[str, Any]) -> tuple[str, str]:
    for article, summary in PAIRS:
        if article in row and summary in row:
            return str(row[article]), str(row[summary])
    told = " or ".join(f"{article} and {summary}" for article, summary in PAIRS)
    raise ValueError(f"data: has columns {sorted(row)}, expected {told}")


def _cell(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    for column in columns:
        if column in row:
            return row[column]
    raise ValueError(f"data: has columns {sorted(row)}, expected {' or '.join(columns)}")


def _lines(source: str) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"data: {source!r} is no file")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            row = parse_json(f"data: {source} line {number}", line)
            if not isinstance(row, dict):
                raise ValueError(f"data: {source} line {number} is no object, expected columns")
            yield row


def _dataset_rows(table: Table, split: str | None = None) -> Iterator[dict[str, Any]]:
    name, config, own = table.data
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"data: {name!r} needs the package datasets: install less_cache[paper], or name a "
            "file with --data"
        ) from None
    try:
        # Streamed: a table may need a thousandth of what there is.
        rows = datasets.load_dataset(name, config or None, split=split or own, streaming=True)
        yield from rows
    except Exception as error:  # Network, hub, scripts: whatever it is, the name led to it.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"data: {name!r} cannot be loaded: {reason}") from error
