"""Full cache, policy alone, Baseline+ and LESS, side by side: what a LESS cache must win.

Where pairs are coded, the policy alone has uncoded slots for the same bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig, codes_data
from ..feature_maps import FeatureMaps
from ..provenance import slots_text
from ..quantization import Quantization
from ..quantization.settings import bits_text
from ..quantization.transforms import Transforms, check_transforms
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
    config: CacheConfig,
    maps: Mapping[str, FeatureMaps],
    length: int,
    transforms: Transforms | None = None,
) -> list[Contestant]:
    """Full, policy alone, Baseline+ at equal bytes, and LESS with each of the given maps.

    Where the config's pairs are coded, the policy alone has 16-bit slots for the same bytes, and
    the policy with coded slots comes after it. Without maps and rank that is all.

    Parameters
    ----------
    config
        Of the LESS cache.
    maps
        By the name that the table uses.
    length
        The windows'; some head must have fewer slots.
    transforms
        The bases of codes; needed where a layer has calibrated ones.

    Raises
    ------
    ValueError
        If nothing would be evicted, or maps or transforms do not fit the config.
    """
    check_transforms(config, transforms)
    coded = coded_name(config.quantization) if config.has_codes else None
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
        if name in (FULL, POLICY, BASELINE_PLUS, coded):
            raise ValueError(f"maps: the name {name!r} is that of another line of the table")
        try:
            entry.check_against(config)
        except ValueError as error:
            raise ValueError(f"maps: {name!r} does not fit the model: {error}") from None
    alone = config.replace(rank=0, hidden=None)
    contestants = [Contestant(FULL)]
    if coded is None:
        contestants.append(Contestant(POLICY, alone))
    else:
        contestants.append(Contestant(POLICY, uncoded(config)))
        contestants.append(Contestant(coded, alone, transforms=transforms))
    if maps or (coded is None and config.has_state):
        plus = config.baseline_plus().replace(hidden=None)
        contestants.append(Contestant(BASELINE_PLUS, plus, transforms=transforms))
    less = [Contestant(name, config, entry, transforms) for name, entry in maps.items()]
    return contestants + less


def coded_name(quantization: Any) -> str:
    """What the table calls the policy with coded slots, by a `CacheConfig.quantization`."""
    if not isinstance(quantization, Quantization):
        return "coded slots"
    keys, values = bits_text(quantization.key_bits), bits_text(quantization.value_bits)
    return f"{keys}-bit slots" if keys == values else f"slots of {keys} and {values} bits"


def uncoded(config: CacheConfig) -> CacheConfig:
    """The sparse cache to compare coded slots with: the bytes spent on slots of 16 bits a number.

    Each head's slots are rounded up, so that the comparison never favours codes. Where that leaves
    a head fewer than the policy takes, all heads have equally many for the same bytes.

    Raises
    ------
    ValueError
        If the policy's own numbers do not go with so few slots.
    """
    plain = config.replace(quantization=None, rank=0, hidden=None, dtype="float16")
    capacities, total, whole = [], 0, 0
    for own, layer in zip(config.with_dtype("float16").layers, plain.layers, strict=True):
        spent = [c * own.slot_bytes + own.low_rank_bytes for c in own.capacities]
        capacities.append([math.ceil(bytes_ / layer.slot_bytes) for bytes_ in spent])
        total += sum(spent)
        whole += layer.kv_heads * layer.slot_bytes
    try:
        try:
            return plain.replace(capacity=capacities, dtype=config.dtype)
        except ValueError:
            return plain.replace(capacity=math.ceil(total / whole), dtype=config.dtype)
    except ValueError as error:
        raise ValueError(f"capacity: in uncoded slots of the same bytes: {error}") from None


def compare(
    model: Any,
    windows: Sequence[Window],
    config: CacheConfig,
    maps: Mapping[str, FeatureMaps],
    *,
    transforms: Transforms | None = None,
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
    transforms
        The bases of codes; needed where a layer has calibrated ones.
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
        If nothing would be evicted, or maps or transforms do not fit the config.
    """
    length = len(windows[0].ids)
    contestants = contestants_for(config, maps, length, transforms)
    dtype = model.dtype
    if config.has_codes and dtype.itemsize > 2:
        # Nobody has to serve in more: codes must not win against a waste.
        dtype = torch.float16
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
            cost = config.full_cache_bytes(length, dtype)
            capacity: Any = length
        else:
            cost = shape.bytes_per_sequence(dtype)
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
        **_codes_facts(config, transforms, dtype),
        **surroundings(),
    }
    return Comparison(rows, facts, scores)


def _codes_facts(
    config: CacheConfig, transforms: Transforms | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What a report says of codes: nothing where there are none."""
    if not config.has_codes:
        return {}
    return {
        "quantization": codes_data(config.quantization),
        "transforms_sha256": None if transforms is None else transforms.digest,
        "bytes_counted_in": str(dtype).removeprefix("torch."),
    }
