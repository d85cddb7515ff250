"""Full cache, policy alone, Baseline+ and LESS, side by side: what a LESS cache must win."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..provenance import slots_text
from .generation import agreement
from .perplexity import Contestant, Recovery, Scores, Window, recovery, score
from .surroundings import surroundings

FULL, POLICY, BASELINE_PLUS = "full cache", "policy alone", "Baseline+"
BINS = 16
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Parameters
    ----------
    name
        Of the contestant.
    capacity
        Slots a head, as `CacheConfig.capacity` has them: one number, or one a layer, or one a head
        of a layer; of the full cache, the windows' length.
    bytes_per_sequence
        What a sequence of the windows' length takes.
    perplexity, second_half
        Over all positions, and over the second half of each window.
    recovery
        Of the gap between policy and full cache; ``None`` for these two, and where there is no gap.
    accepted
        Mean accepted prefix of greedy continuations, in tokens; ``None`` where not asked for.
    positions, losses
        Mean loss in nats a token, by position.
    """

    name: str
    capacity: Any
    bytes_per_sequence: int
    perplexity: float
    second_half: float
    recovery: Recovery | None
    accepted: float | None
    positions: list[float]
    losses: list[float]

    @property
    def slots(self) -> str:
        """The slots of a head in words: 52, or the range and the mean where heads differ."""
        return slots_text(self.capacity)


@dataclass(frozen=True)
class Comparison:
    """All lines, and what they were measured on.

    Parameters
    ----------
    rows
        One a contestant.
    facts
        What was measured and with what, JSON-ready.
    scores
        By a line's name, its loss on every token of every window.
    """

    rows: list[Row]
    facts: dict[str, Any]
    scores: dict[str, Scores] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The line of that name."""
        return next(row for row in self.rows if row.name == name)


def contestants_for(
    config: CacheConfig, maps: Mapping[str, FeatureMaps], length: int
) -> list[Contestant]:
    """Full, policy alone, Baseline+ at equal bytes, and LESS with each of the given maps.

    Parameters
    ----------
    config
        Of the LESS cache.
    maps
        By the name that the table uses.
    length
        The windows'; some head must have fewer slots.

    Raises
    ------
    ValueError
        If nothing would be evicted, or maps do not fit the config.
    """
    least = min(min(layer.capacities) for layer in config.layers)
    if least >= length:
        raise ValueError(
            f"capacity: got {least}, expected fewer than the windows' length = {length}: nothing "
            "would be evicted"
        )
    for policy in config.policies:
        if not policy.evicts:
            raise ValueError(f"policy: {policy} evicts nothing, so there is nothing to compare")
    for name, entry in maps.items():
        if name in (FULL, POLICY, BASELINE_PLUS):
            raise ValueError(f"maps: the name {name!r} is that of another line of the table")
        try:
            entry.check_against(config)
        except ValueError as error:
            raise ValueError(f"maps: {name!r} does not fit the model: {error}") from None
    return [
        Contestant(FULL),
        Contestant(POLICY, config.replace(rank=0, hidden=None)),
        Contestant(BASELINE_PLUS, config.baseline_plus().replace(hidden=None)),
        *(Contestant(name, config, entry) for name, entry in maps.items()),
    ]


def compare(
    model: Any,
    windows: Sequence[Window],
    config: CacheConfig,
    maps: Mapping[str, FeatureMaps],
    *,
    prompts: Tensor | None = None,
    new_tokens: int = 64,
    batch: int = 4,
    progress: bool = True,
) -> Comparison:
    """Measure everything that the table shows.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    windows
        The text, all of one length.
    config
        Of the LESS cache.
    maps
        By the name that the table uses.
    prompts
        [n, S] token ids whose greedy continuations are compared. Default: none are.
    new_tokens
        Length of the continuations.
    batch
        Windows at a time.
    progress
        Show bars.

    Raises
    ------
    ValueError
        If nothing would be evicted, or maps do not fit the config.
    """
    length = len(windows[0].ids)
    contestants = contestants_for(config, maps, length)
    scores: dict[str, Scores] = {}
    for contestant in contestants:
        found = score(model, windows, contestant, batch=batch, progress=progress)
        scores[contestant.name] = found
        logger.info("%s: perplexity %.4f", contestant.name, found.perplexity())
    accepted: dict[str, float] = {}
    if prompts is not None:
        accepted = agreement(model, prompts, contestants[1:], new_tokens=new_tokens)
        accepted[FULL] = float(new_tokens)
    rows = []
    for contestant in contestants:
        found = scores[contestant.name]
        shape = contestant.config
        if shape is None:
            pair = 2 * config.head_dim * model.dtype.itemsize
            cost = config.num_layers * config.kv_heads * pair * length
            capacity: Any = length
        else:
            cost = shape.bytes_per_sequence(model.dtype)
            capacity = shape.capacity
        regained = None
        if contestant.name not in (FULL, POLICY):
            regained = recovery(scores[FULL], scores[POLICY], found)
        positions, losses = found.by_position(BINS)
        rows.append(
            Row(
                name=contestant.name,
                capacity=capacity,
                bytes_per_sequence=cost,
                perplexity=found.perplexity(),
                second_half=found.perplexity(second_half=True),
                recovery=regained,
                accepted=accepted.get(contestant.name),
                positions=positions,
                losses=losses,
            )
        )
    facts = {
        "policy": [policy.to_dict() for policy in config.policies],
        "capacity": config.capacity,
        "rank": config.rank,
        "window": length,
        "windows": len(windows),
        "documents": sorted({window.document for window in windows}),
        "tokens_scored": sum(len(losses) for losses in scores[FULL].losses),
        "new_tokens": new_tokens if prompts is not None else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        **surroundings(),
    }
    return Comparison(rows, facts, scores)
