"""The main job on the shipped model: what several caches make of text it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference_model
from ..config import CacheConfig
from ..integrations.introspection import description
from ..policies import H2O, FullCache
from ..provenance import slots_text
from ..recipe import CacheRecipe
from ..reference_model.shipped_maps import shipped
from .comparison import BINS, FULL
from .demo_speed import Speed, measure_speed
from .generation import accepted_prefix, continue_greedily
from .intervals import drawn_documents
from .perplexity import Contestant, Recovery, Window, cut_windows, recovery, score, spread_over
from .surroundings import surroundings

ALONE, LESS = "H2O alone", "LESS of the paper"
BUDGETS = ("5%", "1.25%")
"""Of the tuned caches; the first is the one whose prompts and heads are shown."""
CAPACITY = 0.05
"""Of the paper's cache, which counts slots and not bytes."""
WINDOWS, PROMPTS, NEW_TOKENS = 24, 32, 64
ROWS = 8
"""Prompts that go on at a time."""
CONTEXT, BATCH = 4096, 8
"""Of the timed steps."""
SHOWN_PROMPT = 70
"""Tokens of a prompt's end that are shown before its continuations."""


@dataclass(frozen=True)
class Line:
    """What one cache reached.

    Parameters
    ----------
    name
        Of the cache.
    slots
        Of a head, in words.
    nbytes, share
        What one sequence takes at the model's longest context, pairs that are not coded counted
        in 16 bits; and as a share of the full cache's.
    perplexity
        Over all windows.
    recovery
        Of what H2O alone loses against the full cache; ``None`` for these two.
    accepted
        For each prompt, how many of the greedy tokens are the full cache's before the first that
        is not.
    low, high
        The 95 % interval of their mean: prompts drawn with replacement.
    positions, losses
        Mean loss in nats a token, by position.
    speed
        On this machine.
    """

    name: str
    slots: str
    nbytes: int
    share: float
    perplexity: float
    recovery: Recovery | None
    accepted: list[int]
    low: float
    high: float
    positions: list[float]
    losses: list[float]
    speed: Speed

    @property
    def mean_accepted(self) -> float:
        """Mean of the accepted prefixes."""
        return sum(self.accepted) / len(self.accepted)


@dataclass(frozen=True)
class Continuation:
    """One prompt, and how each cache goes on.

    Parameters
    ----------
    document
        Where it is from.
    prompt
        Its last tokens, as text.
    accepted
        By the cache's name, how many tokens are the full cache's before the first that is not.
    kept, changed
        By the cache's name: the text of these, and that of the others.
    """

    document: str
    prompt: str
    accepted: dict[str, int]
    kept: dict[str, str]
    changed: dict[str, str]


@dataclass(frozen=True)
class Demo:
    """Everything the report shows.

    Parameters
    ----------
    lines
        One a cache, the full one first.
    continuation
        Of the prompt whose accepted prefix under the first tuned cache is the median.
    tuned
        The first tuned cache's config: its slots by head are shown.
    facts
        What was measured; command, date, machine and versions.
    """

    lines: list[Line]
    continuation: Continuation
    tuned: CacheConfig
    facts: dict[str, Any]

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)


def tuned_name(budget: str) -> str:
    """What the tables call the cache that ships for a budget."""
    return f"tuned, {budget.removesuffix('%')} %"


def contestants_of(model: Any, recipes: Mapping[str, CacheRecipe]) -> list[Contestant]:
    """The full cache, H2O in the paper's bytes, the paper's LESS, and the tuned caches.

    Parameters
    ----------
    model
        The reference model.
    recipes
        The tuned caches by their budgets.
    """
    maps = shipped("h2o", CAPACITY)
    less = CacheConfig.from_model(
        model.config, capacity=CAPACITY, policy=H2O(), rank=maps.rank, dtype="float16"
    )
    # The state's bytes as slots of 16 bits a number: nobody has to serve in more.
    alone = less.baseline_plus().with_dtype(model.dtype)
    contestants = [
        Contestant(FULL),
        Contestant(ALONE, alone),
        Contestant(LESS, less.with_dtype(model.dtype), maps),
    ]
    for budget, recipe in recipes.items():
        recipe.check_model(description(model.config))
        config = recipe.config.with_dtype(model.dtype)
        contestants.append(Contestant(tuned_name(budget), config, recipe.maps, recipe.transforms))
    return contestants


def run_demo(recipes: Mapping[str, CacheRecipe] | None = None, *, progress: bool = True) -> Demo:
    """Load the shipped model, compare the caches on text it never saw, and time them.

    Parameters
    ----------
    recipes
        Caches for the shipped model, by what they are to be called. Default: those that ship
        for `BUDGETS`.
    progress
        Show bars.
    """
    if recipes is None:
        folders = {budget: reference_model.tuned(budget) for budget in BUDGETS}
        recipes = {name: CacheRecipe.from_pretrained(path) for name, path in folders.items()}
    model, tokenizer = reference_model.load()
    contestants = contestants_of(model, recipes)
    documents = [
        (d.name, torch.tensor(tokenizer(d.text, add_special_tokens=False)["input_ids"]))
        for d in reference_model.held_out_documents()
    ]
    length = model.config.max_position_embeddings
    every = cut_windows(documents, length)
    windows, starts = spread_over(every, WINDOWS), spread_over(every, PROMPTS)
    scores = [score(model, windows, c, progress=progress) for c in contestants]
    prompts = torch.stack([window.ids[: length - NEW_TOKENS] for window in starts])
    found = [_continuations(model, prompts, c, progress=progress) for c in contestants]
    text = torch.cat([ids for _, ids in documents])[:CONTEXT]
    speeds = measure_speed(model, contestants, text[None], batch=BATCH)
    full = CacheConfig.from_model(model.config, policy=FullCache(), rank=0, dtype="float16")
    full_bytes = full.full_cache_bytes(length)
    lines, accepted = [], []
    for contestant, own, tokens, speed in zip(contestants, scores, found, speeds, strict=True):
        config = contestant.config
        nbytes = full_bytes if config is None else config.bytes_per_sequence("float16")
        regained = None
        if contestant.name not in (FULL, ALONE):
            regained = recovery(scores[0], scores[1], own)
        kept = accepted_prefix(found[0], tokens)
        accepted.append(kept)
        low, high = mean_interval(kept)
        positions, losses = own.by_position(BINS)
        lines.append(
            Line(
                name=contestant.name,
                slots=f"{length:,}" if config is None else slots_text(config.capacity),
                nbytes=nbytes,
                share=nbytes / full_bytes,
                perplexity=own.perplexity(),
                recovery=regained,
                accepted=kept.tolist(),
                low=low,
                high=high,
                positions=positions,
                losses=losses,
                speed=speed,
            )
        )
    first = len(contestants) - len(recipes)
    chosen = median_place(accepted[first].tolist())
    tuned = next(iter(recipes.values())).config
    names = [contestant.name for contestant in contestants]
    counts = [int(kept[chosen]) for kept in accepted]
    return Demo(
        lines,
        _shown(tokenizer, starts[chosen], names, [t[chosen] for t in found], counts),
        tuned,
        {
            "window": length,
            "windows": len(windows),
            "documents": sorted({window.document for window in windows}),
            "tokens_scored": sum(len(losses) for losses in scores[0].losses),
            "prompts": len(prompts),
            "prompt_tokens": prompts.shape[1],
            "new_tokens": NEW_TOKENS,
            "speed_context": CONTEXT,
            "speed_batch": BATCH,
            **surroundings(),
        },
    )


def mean_interval(values: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean: the values [n] drawn with replacement."""
    count = len(values)
    drawn = drawn_documents(count, seed=seed)
    low, high = np.quantile(drawn @ values.double().numpy() / count, [0.025, 0.975])
    return float(low), float(high)


def median_place(values: Sequence[int]) -> int:
    """Where the median is; of an even number, the lower of the middle two."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return order[(len(order) - 1) // 2]


def _continuations(
    model: Any, prompts: Tensor, contestant: Contestant, *, progress: bool
) -> Tensor:
    """Greedy tokens of every prompt, [n, NEW_TOKENS]."""
    from tqdm import tqdm

    parts = []
    with tqdm(
        total=len(prompts), desc=f"{contestant.name} goes on", unit="prompt", disable=not progress
    ) as bar:
        for rows in prompts.split(ROWS):
            parts.append(continue_greedily(model, rows, contestant, new_tokens=NEW_TOKENS))
            bar.update(len(rows))
    return torch.cat(parts)


def _shown(
    tokenizer: Any,
    start: Window,
    names: Sequence[str],
    found: Sequence[Tensor],
    accepted: Sequence[int],
) -> Continuation:
    """The chosen prompt's end, and what each cache made of it."""
    end = len(start.ids) - NEW_TOKENS
    kept, changed = {}, {}
    for name, tokens, count in zip(names, found, accepted, strict=True):
        kept[name] = tokenizer.decode(tokens[:count].tolist())
        changed[name] = tokenizer.decode(tokens[count:].tolist())
    return Continuation(
        document=start.document,
        prompt=tokenizer.decode(start.ids[end - SHOWN_PROMPT : end].tolist()),
        accepted=dict(zip(names, accepted, strict=True)),
        kept=kept,
        changed=changed,
    )
