"""Perplexity a word over whole documents, as the paper counts it: by lm-evaluation-harness's rules.

A document is cut into stretches as long as the model allows, the last one with as much context as
there is room for. The first token follows the end-of-text token. What is summed over tokens is
divided by the number of words of the document as the data set has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .._checks import check_int
from ..integrations.transformers.padding import padded
from .perplexity import Contestant, logits_under

DETOKENIZED = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
CLOSED_UP = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
LAST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True)
class Stretch:
    """Part of a document, and how many of its last tokens are scored.

    Parameters
    ----------
    document
        Which.
    ids
        What the model reads, and after it the token to be foreseen last.
    scored
        At least 1.
    """

    document: int
    ids: list[int]
    scored: int


@dataclass(frozen=True)
class WordScores:
    """Nats and words of each document.

    Parameters
    ----------
    nats, words, tokens
        One entry a document.
    """

    nats: list[float]
    words: list[int]
    tokens: list[int]

    @property
    def word_perplexity(self) -> float:
        """Exp of the nats a word."""
        return math.exp(sum(self.nats) / sum(self.words))

    @property
    def token_perplexity(self) -> float:
        """Exp of the nats a token."""
        return math.exp(sum(self.nats) / sum(self.tokens))


def count_words(text: str) -> int:
    """Words between white space; where the text begins or ends with it, an empty one there, too."""
    return len(re.split(r"\s+", text))


def without_wikitext_marks(text: str) -> str:
    """WikiText's spaced-out punctuation as people write it; words are counted before."""
    text = text.replace("s '", "s'")
    for found, written in DETOKENIZED:
        text = text.replace(found, written)
    for pattern, closed in CLOSED_UP:
        text = re.sub(pattern, closed, text)
    for found, written in LAST:
        text = text.replace(found, written)
    return text


def stretches_of(document: int, tokens: Sequence[int], prefix: int, length: int) -> list[Stretch]:
    """Each token of a document once as one to be foreseen, with up to `length` before it.

    Parameters
    ----------
    document
        Its number.
    tokens
        Of the document.
    prefix
        What stands before the first.
    length
        The most tokens that the model reads.
    """
    text = [prefix, *tokens]
    found = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        # As much context as there is room for: the last stretch overlaps the one before.
        first = start if stop - start == length or start == 0 else stop - length
        found.append(Stretch(document, text[first : stop + 1], stop - start))
    return found


@torch.no_grad()
def score_words(
    model: Any,
    documents: Sequence[tuple[Sequence[int], int]],
    contestant: Contestant,
    *,
    prefix: int,
    length: int,
    batch: int = 1,
    progress: bool = True,
) -> WordScores:
    """Nats of each document under a cache, in decode semantics; each stretch from an empty cache.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    documents
        Token ids, and the number of words that they stand for.
    contestant
        The cache.
    prefix
        The token before the first.
    length
        The most tokens that the model reads at once.
    batch
        Stretches at a time.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If there is no token.
    """
    check_int("length", length, minimum=1)
    check_int("batch", batch, minimum=1)
    stretches = [
        stretch
        for number, (tokens, _) in enumerate(documents)
        for stretch in stretches_of(number, tokens, prefix, length)
    ]
    if not stretches:
        raise ValueError("data: holds no tokens, expected at least one")
    # Of like length together, the longest first: memory runs out at once or never.
    stretches.sort(key=lambda stretch: -len(stretch.ids))
    logits_of = logits_under(model, contestant)
    nats = [0.0] * len(documents)
    with tqdm(
        total=sum(stretch.scored for stretch in stretches),
        desc=contestant.name,
        unit="token",
        disable=not progress,
    ) as bar:
        for start in range(0, len(stretches), batch):
            part = stretches[start : start + batch]
            # On the right, where nothing that is scored sees it.
            ids = padded([stretch.ids for stretch in part], side="right")[0].to(model.device)
            logits = logits_of(ids[:, :-1])
            for row, stretch in enumerate(part):
                stop = len(stretch.ids) - 1
                own = logits[row, stop - stretch.scored : stop].float().log_softmax(1)
                wanted = ids[row, stop + 1 - stretch.scored : stop + 1]
                nats[stretch.document] -= float(own.gather(1, wanted.unsqueeze(1)).double().sum())
                bar.update(stretch.scored)
    return WordScores(
        nats, [words for _, words in documents], [len(tokens) for tokens, _ in documents]
    )
