"""What perplexity hides of a small cache: keys by length and depth, far context, far names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .._files import json_digest
from ..training.runs import model_digest
from .intervals import Estimate, estimated_mean
from .kept import KeptResults
from .long_text import (
    Reading,
    TextWindow,
    key_tokens,
    read,
    short_context_nats,
    told_apart,
    windows_with_names,
)
from .needles import Example, make_example
from .paper import FULL
from .perplexity import Contestant
from .recall import recall
from .surroundings import surroundings

NEW_TOKENS = {"passkey": 12, "multikey": 12, "variables": 48}


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Parameters
    ----------
    tasks
        Of `needles.TASKS`, and ``"text"``: key tokens and names of real text.
    lengths
        Tokens of the prompts with hidden texts.
    depths
        Where they hide: 0 is the beginning.
    samples
        Examples of each length and depth.
    style
        ``"prose"`` or ``"code"``.
    seed
        Of the examples.
    window
        Tokens of a stretch of real text.
    windows
        At most so many.
    short
        Tokens of the short context that key tokens are told by.
    batch
        Examples or windows at a time.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    style: str
    seed: int
    window: int
    windows: int
    short: int
    batch: int


@dataclass(frozen=True)
class Cell:
    """One length and depth of a task, with one cache.

    Parameters
    ----------
    cache
        Its name.
    task, length, depth
        What was asked.
    recalled
        Mean share of the answers that the greedy continuation has.
    nats
        Mean nats a token of the right continuation.
    each
        Of each example, its share of the answers and its nats a token.
    example
        What the first example asked for, and what came.
    """

    cache: str
    task: str
    length: int
    depth: float
    recalled: float
    nats: float
    each: list[tuple[float, float]]
    example: tuple[str, str]


@dataclass(frozen=True)
class LongRange:
    """All of it.

    Parameters
    ----------
    caches
        Their names, the full one first.
    cells
        Of the hidden texts.
    text
        By cache, `long_text.told_apart`'s figures; empty if not asked for.
    facts
        What was measured and with what, JSON-ready.
    """

    caches: list[str]
    cells: list[Cell]
    text: dict[str, dict[str, Any]]
    facts: dict[str, Any]

    def of(self, cache: str, task: str) -> list[Cell]:
        """The cells of a cache and a task."""
        return [cell for cell in self.cells if (cell.cache, cell.task) == (cache, task)]

    def mean(self, cache: str, task: str) -> tuple[Estimate, Estimate]:
        """Mean share recalled and mean nats, over all lengths and depths.

        The texts of a seed hide the same among the same lines: seeds are what intervals draw.
        """
        each = [
            (str(seed), *values)
            for cell in self.of(cache, task)
            for seed, values in enumerate(cell.each)
        ]
        seeds, shares, nats = zip(*each, strict=True)
        ones = [1] * len(each)
        return estimated_mean(seeds, shares, ones), estimated_mean(seeds, nats, ones)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        cells = [dataclasses.asdict(cell) for cell in self.cells]
        means = [
            {
                "cache": cache,
                "task": task,
                "recalled": recalled.value,
                "recalled_interval": recalled.interval,
                "nats": nats.value,
                "nats_interval": nats.interval,
            }
            for task in dict.fromkeys(cell.task for cell in self.cells)
            for cache in self.caches
            for recalled, nats in [self.mean(cache, task)]
        ]
        told = {"caches": self.caches, "cells": cells, "means": means, "text": self.text}
        return {**self.facts, **told}


def measure_long_range(
    model: Any,
    tokenizer: Any,
    contestants: Sequence[Contestant],
    plan: Plan,
    documents: Sequence[tuple[str, str]],
    filler: Sequence[str],
    folder: Path,
    *,
    named: str,
    progress: bool = True,
) -> LongRange:
    """Ask every cache everything; a stopped run goes on from the last part that was finished.

    Parameters
    ----------
    model, tokenizer
        A transformers model that `attach` takes.
    contestants
        The full cache first.
    plan
        What is asked.
    documents
        Names and texts for ``"text"``.
    filler
        Lines that keys hide among.
    folder
        Where finished parts are kept.
    named
        What the results call the model.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If there is no tokenizer, the text is too short, or the folder holds another run.
    """
    if tokenizer is None:
        raise ValueError("model: has no tokenizer, which texts need")
    settings = {
        "model": named,
        "model_digest": model_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(plan),
        "filler_digest": json_digest([*filler]),
        "caches": {entry.name: _told(entry) for entry in contestants},
        "parts": "with intervals",
    }
    hidden = [task for task in plan.tasks if task != "text"]
    windows: list[TextWindow] = []
    if "text" in plan.tasks:
        windows = windows_with_names(documents, tokenizer, plan.window, plan.windows)
        settings["text_digest"] = json_digest([window.ids.tolist() for window in windows])
    # Before anything is measured: what does not fit is told at once.
    examples = {
        (task, length, depth): _examples(tokenizer, plan, task, length, depth, filler)
        for task in hidden
        for length in plan.lengths
        for depth in plan.depths
    }
    kept = KeptResults(folder, settings)
    cells: list[Cell] = []
    text: dict[str, dict[str, Any]] = {}
    total = len(contestants) * (len(examples) + bool(windows))
    with tqdm(total=total, desc="long range", unit="part", disable=not progress) as bar:
        for entry in contestants:
            for (task, length, depth), own in examples.items():
                bar.set_postfix_str(f"{entry.name}, {task}, {length}")
                name = f"{entry.name}: {task} {length} {depth}"
                found = kept.get(
                    name, functools.partial(_ask, model, tokenizer, entry, own, task, plan)
                )
                cells.append(Cell(entry.name, task, length, depth, **found))
                bar.update()
        if windows:
            reader = _TextReader(model, windows, plan, contestants[0])
            for entry in contestants:
                bar.set_postfix_str(f"{entry.name}, text")
                text[entry.name] = kept.get(
                    f"{entry.name}: text", functools.partial(reader.figures, entry)
                )
                bar.update()
    return LongRange(
        [entry.name for entry in contestants], cells, text, {**settings, **surroundings()}
    )


def _examples(
    tokenizer: Any, plan: Plan, task: str, length: int, depth: float, filler: Sequence[str]
) -> list[Example]:
    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return [
        make_example(
            task,
            tokenize,
            length=length,
            depth=depth,
            style=plan.style,
            seed=plan.seed + number,
            filler=filler,
        )
        for number in range(plan.samples)
    ]


def _ask(
    model: Any,
    tokenizer: Any,
    contestant: Contestant,
    examples: Sequence[Example],
    task: str,
    plan: Plan,
) -> dict[str, Any]:
    found = recall(
        model, tokenizer, examples, contestant, new_tokens=NEW_TOKENS[task], batch=plan.batch
    )
    return {
        "recalled": sum(entry.share for entry in found) / len(found),
        "nats": sum(entry.nats for entry in found) / len(found),
        "each": [[entry.share, entry.nats] for entry in found],
        "example": [", ".join(examples[0].answers), found[0].text],
    }


class _TextReader:
    """Reads the windows with every cache; the key tokens are the full cache's, found once."""

    def __init__(
        self, model: Any, windows: Sequence[TextWindow], plan: Plan, full: Contestant
    ) -> None:
        self.model, self.windows, self.plan, self.full = model, windows, plan, full
        self.ids = [window.ids for window in windows]

    @functools.cached_property
    def full_readings(self) -> list[Reading]:
        return read(self.model, self.ids, self.full, batch=self.plan.batch)

    @functools.cached_property
    def keys(self) -> list[Any]:
        short = short_context_nats(self.model, self.ids, self.plan.short)
        return key_tokens(self.full_readings, short)

    def figures(self, contestant: Contestant) -> dict[str, Any]:
        readings = self.full_readings
        if contestant.name != FULL:
            readings = read(self.model, self.ids, contestant, batch=self.plan.batch)
        return told_apart(self.windows, readings, self.keys)


def _told(contestant: Contestant) -> Any:
    if contestant.config is None:
        return "full"
    digest = None if contestant.maps is None else contestant.maps.digest
    told = {"config": contestant.config.to_dict(), "maps": digest}
    if contestant.transforms is not None:
        told["transforms"] = contestant.transforms.digest
    return told
