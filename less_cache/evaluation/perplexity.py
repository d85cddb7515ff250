"""Perplexity under the exact decode semantics, by document and by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._checks import check_int
from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..integrations.transformers.teacher_forcing import small_cache_logits
from ..quantization.transforms import Transforms
from .intervals import drawn_documents


@dataclass(frozen=True)
class Contestant:
    """A cache to be judged.

    Parameters
    ----------
    name
        What the table calls it.
    config
        Its shape and policy; ``None``: the model's own full cache.
    maps
        Where the config's rank is above 0.
    transforms
        Where the config's pairs are coded in calibrated bases.
    """

    name: str
    config: CacheConfig | None = None
    maps: FeatureMaps | None = None
    transforms: Transforms | None = None


@dataclass(frozen=True)
class Window:
    """A stretch of one document that is scored from an empty cache.

    Parameters
    ----------
    document
        Its name.
    ids
        [N] token ids.
    """

    document: str
    ids: Tensor


@dataclass
class Scores:
    """What one contestant made of the windows.

    Parameters
    ----------
    contestant
        Whose scores they are.
    losses
        For each window [N - 1], nats a token, the first being that of the second token.
    documents
        For each window, its document.
    """

    contestant: Contestant
    losses: list[Tensor]
    documents: list[str] = field(default_factory=list)

    def by_document(self, *, second_half: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Summed nats and counted tokens of each document, in the order of their names."""
        sums: dict[str, list[float]] = {}
        for document, losses in zip(self.documents, self.losses, strict=True):
            part = losses[len(losses) // 2 :] if second_half else losses
            entry = sums.setdefault(document, [0.0, 0.0])
            entry[0] += float(part.double().sum())
            entry[1] += len(part)
        table = np.array([sums[name] for name in sorted(sums)])
        return table[:, 0], table[:, 1]

    def perplexity(self, *, second_half: bool = False) -> float:
        """Exp of the mean loss a token; of each window's second half alone, if asked."""
        nats, tokens = self.by_document(second_half=second_half)
        return float(np.exp(nats.sum() / tokens.sum()))

    def by_position(self, bins: int) -> tuple[list[float], list[float]]:
        """Mean position and mean loss in `bins` equal stretches of the windows' length."""
        longest = max(len(losses) for losses in self.losses)
        edges = np.linspace(0, longest, bins + 1).round().astype(int)
        whole = [losses for losses in self.losses if len(losses) == longest]
        mean = torch.stack(whole).double().mean(0)
        stretches = list(pairwise(edges))
        centres = [float(a + b) / 2 for a, b in stretches]
        means = [float(mean[a:b].mean()) for a, b in stretches]
        return centres, means


@dataclass(frozen=True)
class Recovery:
    """The share of a policy's loss in perplexity that another cache wins back.

    Parameters
    ----------
    share
        ``(policy - less) / (policy - full)``.
    low, high
        Its 95 % interval: documents drawn with replacement. NaN where there is but one.
    """

    share: float
    low: float
    high: float


def cut_windows(documents: Sequence[tuple[str, Tensor]], length: int) -> list[Window]:
    """Stretches of `length` tokens that do not overlap; what is left of a document is not scored.

    Raises
    ------
    ValueError
        If no document is that long.
    """
    check_int("length", length, minimum=4)
    windows = [
        Window(name, ids[start : start + length])
        for name, ids in documents
        for start in range(0, len(ids) - length + 1, length)
    ]
    if not windows:
        longest = max((len(ids) for _, ids in documents), default=0)
        raise ValueError(
            f"data: the longest document has {longest} tokens, expected at least length = {length}"
        )
    return windows


def spread_over(windows: list[Window], count: int) -> list[Window]:
    """So many of them, evenly over all, so that no single document decides."""
    return windows[:: max(1, len(windows) // count)][:count]


def logits_under(model: Any, contestant: Contestant) -> Callable[[Tensor], Tensor]:
    """What gives a model's logits [B, N, V] for token ids [B, N], as if it decoded them."""
    config, maps = contestant.config, None
    if config is None:
        return lambda ids: model(ids, use_cache=False).logits
    if contestant.maps is not None:
        maps = list(contestant.maps.to(model.device, torch.float32))
    return lambda ids: small_cache_logits(
        model, config, maps, ids, transforms=contestant.transforms
    )


@torch.no_grad()
def score(
    model: Any,
    windows: Sequence[Window],
    contestant: Contestant,
    *,
    batch: int = 4,
    progress: bool = True,
) -> Scores:
    """Each token's loss in each window, as if the model had decoded it token by token.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    windows
        From `cut_windows`.
    contestant
        The cache.
    batch
        Windows at a time.
    progress
        Show a bar.
    """
    losses: list[Tensor] = []
    logits_of = logits_under(model, contestant)
    bar = tqdm(total=len(windows), desc=contestant.name, unit="window", disable=not progress)
    with bar:
        for start in range(0, len(windows), batch):
            ids = torch.stack([w.ids for w in windows[start : start + batch]]).to(model.device)
            logits = logits_of(ids)
            log_likelihoods = logits[:, :-1].float().log_softmax(2)
            picked = log_likelihoods.gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)
            losses.extend((-picked).cpu())
            bar.update(len(ids))
    return Scores(contestant, losses, [window.document for window in windows])


def recovery(full: Scores, policy: Scores, other: Scores, *, seed: int = 0) -> Recovery | None:
    """The share of the gap between `policy` and `full` that `other` wins back.

    ``None`` where there is no gap: the policy does as well as the full cache, or so nearly that
    documents drawn with replacement do not tell.

    Parameters
    ----------
    full, policy, other
        Scores of the same windows.
    seed
        Of the bootstrap.
    """
    tables = [scores.by_document() for scores in (full, policy, other)]
    count = len(tables[0][0])

    def gaps(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of the gap won back, and the gap."""
        perplexities = [np.exp((weights @ nats) / (weights @ tokens)) for nats, tokens in tables]
        best, worst, mine = perplexities
        return worst - mine, worst - best

    drawn = drawn_documents(count, seed=seed)
    won, gap = gaps(np.concatenate([np.ones((1, count)), drawn]))
    if not (gap[0] > 0 and np.quantile(gap[1:], 0.025) > 0):
        return None
    # The few resamples without a gap say nothing of its share.
    shares = won[1:][gap[1:] > 0] / gap[1:][gap[1:] > 0]
    low, high = np.quantile(shares, [0.025, 0.975]) if count > 1 else (math.nan, math.nan)
    return Recovery(float(won[0] / gap[0]), float(low), float(high))
