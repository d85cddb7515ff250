"""What of a real text needs its far past: tokens that a short context does not foresee, and names.

Key tokens are chosen as LongPPL does (arXiv 2410.23771): the full cache foresees them, and much
better than the same model that has read only the last few tokens. Names are identifiers of code
that come again; the further back the last time, the less a small cache may know of it.
"""

from __future__ import annotations

import bisect
import keyword
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .intervals import estimated_mean
from .perplexity import Contestant, logits_under

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")
CONTRAST = 2.0
"""Nats that a key token gains from its far context, at least."""
FORESEEN = 2.0
"""Nats of a key token with the full context, at most."""
DISTANCES = (64, 256)
"""Tokens since a name came last, where one class of names ends and the next begins."""


@dataclass(frozen=True)
class Name:
    """A name that came before.

    Parameters
    ----------
    start, stop
        Its tokens in the window.
    distance
        Tokens since its last end.
    """

    start: int
    stop: int
    distance: int


@dataclass(frozen=True)
class TextWindow:
    """A stretch of a document.

    Parameters
    ----------
    document
        Its name.
    ids
        [N] token ids.
    names
        Those that come again in it.
    """

    document: str
    ids: Tensor
    names: tuple[Name, ...]


@dataclass(frozen=True)
class Reading:
    """What one cache made of a window.

    Parameters
    ----------
    nats
        [N - 1], of the tokens from the second on.
    hits
        [N - 1], whether each was the likeliest.
    """

    nats: Tensor
    hits: Tensor


def windows_with_names(
    documents: Sequence[tuple[str, str]], tokenizer: Any, length: int, limit: int | None = None
) -> list[TextWindow]:
    """Stretches of `length` tokens that do not overlap, with the names that come again in each.

    Parameters
    ----------
    documents
        Names and texts.
    tokenizer
        One that tells where in the text its tokens are, as fast ones do.
    length
        Tokens.
    limit
        At most so many, spread over the documents.

    Raises
    ------
    ValueError
        If the tokenizer does not tell, or no document is that long.
    """
    found = []
    for document, text in documents:
        try:
            told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise ValueError(
                "model: its tokenizer does not tell where its tokens are in a text, which a fast "
                "one does"
            ) from None
        ids, places = told["input_ids"], told["offset_mapping"]
        for start in range(0, len(ids) - length + 1, length):
            stop = start + length
            names = names_again(text, places[start:stop])
            found.append(TextWindow(document, torch.tensor(ids[start:stop]), names))
    if not found:
        raise ValueError(f"data: no document has length = {length} tokens")
    if limit is None or limit >= len(found):
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def names_again(text: str, places: Sequence[tuple[int, int]]) -> tuple[Name, ...]:
    """Names of a stretch that come in it for the second time or later.

    Parameters
    ----------
    text
        The document.
    places
        Begin and end in it of each token of the stretch.
    """
    begins, ends = [begin for begin, _ in places], [end for _, end in places]
    found = []
    last: dict[str, int] = {}
    for match in NAME.finditer(text, begins[0], places[-1][1]):
        word = match.group()
        if keyword.iskeyword(word):
            continue
        # The first token that reaches into the word, and the first that begins after it.
        start = bisect.bisect_right(ends, match.start())
        stop = bisect.bisect_left(begins, match.end(), lo=start)
        if word in last and start > 0:
            found.append(Name(start, stop, start - last[word]))
        last[word] = stop
    return tuple(found)


@torch.no_grad()
def read(
    model: Any, windows: Sequence[Tensor], contestant: Contestant, *, batch: int = 4
) -> list[Reading]:
    """Every token of windows [N] of one length, in decode semantics.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    windows
        Token ids.
    contestant
        The cache.
    batch
        Windows at a time.
    """
    found = []
    logits_of = logits_under(model, contestant)
    for start in range(0, len(windows), batch):
        ids = torch.stack([*windows[start : start + batch]]).to(model.device)
        logits = logits_of(ids)
        for own, wanted in zip(logits[:, :-1], ids[:, 1:], strict=True):
            nats = F.cross_entropy(own.float(), wanted, reduction="none")
            found.append(Reading(nats.cpu(), (own.argmax(1) == wanted).cpu()))
    return found


def short_context_nats(
    model: Any, windows: Sequence[Tensor], short: int, *, batch: int = 16
) -> list[Tensor]:
    """[N - 1] nats of each token after the `short` / 2 to `short` tokens before it, and no more."""
    half = max(1, short // 2)
    found = []
    for ids in windows:
        starts = [*range(0, max(1, len(ids) - half), half)]
        parts = [ids[start : start + 2 * half] for start in starts]
        # What is added on the right is seen by nothing that counts.
        parts = [F.pad(part, (0, 2 * half - len(part))) for part in parts]
        readings = read(model, parts, Contestant("short"), batch=batch)
        nats = torch.empty(len(ids) - 1)
        for start, reading in zip(starts, readings, strict=True):
            # The first half is context; at the beginning there is no more than that.
            own = reading.nats[: len(ids) - 1 - start]
            skipped = 0 if start == 0 else half - 1
            nats[start + skipped : start + len(own)] = own[skipped:]
        found.append(nats)
    return found


def key_tokens(full: Sequence[Reading], short: Sequence[Tensor]) -> list[Tensor]:
    """[N - 1], whether each token needs its far context: the full cache's judgement."""
    return [
        (near - reading.nats > CONTRAST) & (reading.nats < FORESEEN)
        for reading, near in zip(full, short, strict=True)
    ]


def told_apart(
    windows: Sequence[TextWindow], readings: Sequence[Reading], keys: Sequence[Tensor]
) -> dict[str, Any]:
    """A cache's figures, JSON-ready.

    Parameters
    ----------
    windows, readings, keys
        One a window; the keys from `key_tokens`.

    Returns
    -------
    dict
        Nats a token: of all, of the key tokens, of the others. For names of each class of distance
        how many there are, their nats a token, and of those that have several tokens the share
        whose first token leads to all of the others. Each with an ``_interval``: 95 %, documents
        drawn with replacement; ``None`` for fewer than two.
    """
    nats = [reading.nats.double() for reading in readings]
    documents = [window.document for window in windows]
    names: dict[str, dict[str, Any]] = {}
    for low, high in zip((0, *DISTANCES), (*DISTANCES, None), strict=True):
        own = [
            (window.document, reading, name)
            for window, reading in zip(windows, readings, strict=True)
            for name in window.names
            if low <= name.distance and (high is None or name.distance < high)
        ]
        several = [
            (document, r.hits[n.start : n.stop - 1].all().reshape(1).double())
            for document, r, n in own
            if n.stop - n.start > 1
        ]
        parts = [(document, r.nats[n.start - 1 : n.stop - 1].double()) for document, r, n in own]
        names[distance_name(low, high)] = {
            "names": len(own),
            **_mean("nats", parts),
            "several_tokens": len(several),
            **_mean("completed", several),
        }
    return {
        "tokens": sum(map(len, nats)),
        **_mean("nats", zip(documents, nats, strict=True)),
        "key_tokens": sum(int(chosen.sum()) for chosen in keys),
        **_mean("key_nats", [(d, n[k]) for d, n, k in zip(documents, nats, keys, strict=True)]),
        **_mean("other_nats", [(d, n[~k]) for d, n, k in zip(documents, nats, keys, strict=True)]),
        "names": names,
    }


def distance_name(low: int, high: int | None) -> str:
    """A class of distances in words."""
    if high is None:
        return f"{low} and more"
    return f"under {high}" if low == 0 else f"{low} to {high - 1}"


def _mean(name: str, parts: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """The mean of documents' numbers and its interval, JSON-ready."""
    told = [(document, float(own.sum()), len(own)) for document, own in parts]
    found = estimated_mean([t[0] for t in told], [t[1] for t in told], [t[2] for t in told])
    value = None if math.isnan(found.value) else found.value
    return {name: value, f"{name}_interval": found.interval}
