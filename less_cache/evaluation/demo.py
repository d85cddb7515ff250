"""The main job on the shipped model: held-out text under four caches, and what a step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import reference_model
from ..config import CacheConfig
from ..policies import SinkWindow
from ..reference_model.shipped_maps import shipped
from .bench import Timing, bench_layer
from .comparison import FULL, POLICY, Comparison, compare
from .perplexity import Window, cut_windows
from .surroundings import surroundings

CAPACITY = 0.05
WINDOWS, PROMPTS, NEW_TOKENS = 32, 16, 64
"""As `less-cache eval` of docs/quality.md takes them, so that the figures are the same."""
STRETCH = 240
"""Tokens of a window that are shown one by one."""
CONTEXT, BATCH = 8192, 4
"""Of the timed layer."""
LESS = "LESS"


@dataclass(frozen=True)
class TokenLoss:
    """What the caches made of one token.

    Parameters
    ----------
    text
        The token's.
    full, policy, less
        Its loss under each cache, in nats.
    """

    text: str
    full: float
    policy: float
    less: float


@dataclass(frozen=True)
class Demo:
    """Everything the report shows.

    Parameters
    ----------
    comparison
        Of the caches, over all windows.
    ahead
        In how many windows LESS loses less than its policy.
    document, tokens
        The end of one window, token by token: the window whose share won back is the median.
    timings
        A decode step of one layer.
    around
        Command, date, machine and versions.
    """

    comparison: Comparison
    ahead: int
    document: str
    tokens: list[TokenLoss]
    timings: list[Timing]
    around: dict[str, Any]


def run_demo(*, progress: bool = True) -> Demo:
    """Load the shipped model, compare the caches on text it never saw, and time a step.

    Parameters
    ----------
    progress
        Show bars.
    """
    model, tokenizer = reference_model.load()
    # Of what ships, the pair that comes closest to the full cache at this size (docs/quality.md).
    maps = shipped("sinkwindow", CAPACITY)
    config = CacheConfig.from_model(
        model.config, capacity=CAPACITY, policy=SinkWindow(), rank=maps.rank, dtype=model.dtype
    )
    documents = [
        (d.name, torch.tensor(tokenizer(d.text, add_special_tokens=False)["input_ids"]))
        for d in reference_model.held_out_documents()
    ]
    length = model.config.max_position_embeddings
    windows = spread(cut_windows(documents, length), WINDOWS)
    prompts = torch.stack([w.ids[: length - NEW_TOKENS] for w in spread(windows, PROMPTS)])
    comparison = compare(
        model,
        windows,
        config,
        {LESS: maps},
        prompts=prompts,
        new_tokens=NEW_TOKENS,
        progress=progress,
    )
    shares = shares_won_back(comparison)
    chosen = median_window(shares)
    return Demo(
        comparison,
        ahead=sum(share > 0 for share in shares),
        document=windows[chosen].document,
        tokens=_tokens(tokenizer, windows, comparison, chosen),
        timings=bench_layer(context=CONTEXT, batch=BATCH, capacity=CAPACITY),
        around=surroundings(),
    )


def spread(windows: list[Window], count: int) -> list[Window]:
    """So many of them, spread over the documents, so that no single one decides."""
    return windows[:: max(1, len(windows) // count)][:count]


def shares_won_back(comparison: Comparison) -> list[float]:
    """For each window, the share of the policy's loss in nats that LESS wins back."""
    lost = [
        torch.stack(comparison.scores[name].losses).double().mean(1)
        for name in (FULL, POLICY, LESS)
    ]
    full, policy, less = lost
    return ((policy - less) / (policy - full)).tolist()


def median_window(shares: list[float]) -> int:
    """The window of the median share; of an even number, the upper of the middle two."""
    order = sorted(range(len(shares)), key=shares.__getitem__)
    return order[len(order) // 2]


def _tokens(
    tokenizer: Any, windows: list[Window], comparison: Comparison, chosen: int
) -> list[TokenLoss]:
    """The last tokens of the chosen window."""
    # The first token of a window has no loss.
    texts = [str(tokenizer.decode([token])) for token in windows[chosen].ids[1:].tolist()]
    losses = [comparison.scores[name].losses[chosen].tolist() for name in (FULL, POLICY, LESS)]
    return [TokenLoss(*entry) for entry in zip(texts, *losses, strict=True)][-STRETCH:]
