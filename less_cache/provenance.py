"""What feature maps were trained for, and whether they are used for something else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .config import CacheConfig
from .feature_maps import FeatureMaps
from .quantization import Quantization
from .quantization.settings import bits_text
from .quantization.transforms import Transforms


def trained_for(maps: FeatureMaps) -> CacheConfig | None:
    """The config that maps were trained for last; ``None`` where their record does not say."""
    for record in (maps.record.get("distill"), maps.record):
        data = record.get("config") if isinstance(record, dict) else None
        if isinstance(data, dict):
            try:
                return CacheConfig.from_dict(data)
            except (KeyError, TypeError, ValueError):
                # Of an older format, or of a policy that this process does not know.
                continue
    return None


def bases_of(maps: FeatureMaps) -> str | None:
    """The digest of the transforms that maps were trained with last; ``None``: without any."""
    record = maps.record.get("distill", maps.record)
    return record.get("transforms_sha256") if isinstance(record, dict) else None


def mismatches(
    maps: FeatureMaps,
    config: CacheConfig,
    model_id: str | None = None,
    transforms: Transforms | None = None,
) -> list[str]:
    """In words what maps of fitting shapes were trained for besides what they are to serve.

    Parameters
    ----------
    maps
        The maps.
    config
        What they are to serve.
    model_id
        The model that they are to serve, where its name is known.
    transforms
        The bases of codes that they are to serve with.
    """
    told = []
    if None not in (model_id, maps.model_id) and model_id != maps.model_id:
        told.append(f"trained for the model {maps.model_id}, not {model_id}")
    before = trained_for(maps)
    if before is None:
        return told
    # `recent` follows the capacity; a policy is another one by its kind or its own numbers.
    try:
        same = config.replace(capacity=before.capacity).policies == before.policies
    except ValueError:
        same = False
    if not same:
        told.append(f"trained for {before.policies[0]}, not {config.policies[0]}")
    if before.capacities != config.capacities:
        told.append(
            f"trained for a capacity of {slots_text(before.capacity)}, not "
            f"{slots_text(config.capacity)}"
        )
    if before.quantization != config.quantization:
        told.append(
            f"trained for pairs stored {codes_text(before.quantization)}, not "
            f"{codes_text(config.quantization)}"
        )
    elif transforms is not None and bases_of(maps) != transforms.digest:
        told.append("trained with other transforms than those given")
    return told


def codes_text(quantization: Quantization | Sequence[Quantization | None] | None) -> str:
    """How pairs are stored, in words: a `CacheConfig.quantization`, one for all or one a layer."""
    if isinstance(quantization, Sequence):
        return _by_layer([codes_text(entry) for entry in quantization])
    if quantization is None:
        return "as they are"
    keys, values = bits_text(quantization.key_bits), bits_text(quantization.value_bits)
    bits = keys if keys == values else f"{keys} and {values}"
    return f"in {bits} bits ({quantization.transform})"


def ranks_text(rank: int | Sequence[int]) -> str:
    """A `CacheConfig.rank` in words."""
    return f"{rank}" if isinstance(rank, int) else _by_layer([f"{entry}" for entry in rank])


def _by_layer(texts: list[str]) -> str:
    """What is said of each layer, once for layers side by side that agree."""
    told, first = [], 0
    for text, run in itertools.groupby(texts):
        last = first + len([*run]) - 1
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        told.append(f"{text} in {layers}")
        first = last + 1
    return ", ".join(told)


def slots_text(capacity: Any) -> str:
    """A `CacheConfig.capacity` in words: 52, or the range and the mean where heads differ."""
    numbers = _numbers(capacity)
    if len(set(numbers)) == 1:
        return f"{numbers[0]:,}"
    return f"{min(numbers):,} to {max(numbers):,}, mean {sum(numbers) / len(numbers):,.1f}"


def _numbers(capacity: Any) -> list[int]:
    if isinstance(capacity, int):
        return [capacity]
    # A layer whose heads agree stands for as many heads as a layer whose heads do not.
    heads = max((len(entry) for entry in capacity if not isinstance(entry, int)), default=1)
    return [
        slots
        for entry in capacity
        for slots in ([entry] * heads if isinstance(entry, int) else entry)
    ]
