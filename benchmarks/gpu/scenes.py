"""Full caches of one layer, tokens for them, and what the parts write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import less_cache as lc
from less_cache.arrays import LayerArrays, empty_arrays
from less_cache.layer_config import LayerConfig
from less_cache.layer_maps import LayerMaps

POLICIES = (
    lc.H2O(recent=4),
    lc.DecayedH2O(factor=0.97),
    lc.TOVA(),
    lc.SinkWindow(sinks=4),
    lc.ObservationWindow(window=4),
    lc.Scissorhands(window=9),
    lc.KeyNorm(sinks=1, recent=2),
)


def layer_of(
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    *,
    policy: lc.Policy = POLICIES[0],
    rank: int = 8,
    dtype: str = "float16",
    softcap: float | None = None,
    hidden: int = 512,
    seed: int = 0,
) -> tuple[LayerConfig, LayerMaps | None]:
    """One layer, and untrained maps for it."""
    config = lc.CacheConfig(
        num_layers=1,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        policy=policy,
        rank=rank,
        dtype=dtype,
        softcap=softcap,
    )
    generator = torch.Generator().manual_seed(seed)
    maps = None
    if rank:
        maps = lc.FeatureMaps.initialise(config, hidden=hidden, generator=generator)
    return config.layer(0), None if maps is None else maps[0]


def filled_arrays(
    layer: LayerConfig, batch: int, device: Any, generator: torch.Generator
) -> tuple[LayerArrays, Tensor]:
    """A cache as after many tokens, every slot held; and its lengths [B]."""
    arrays = empty_arrays(layer, batch, device=device)
    for array in (arrays.keys, arrays.values):
        array.normal_(generator=generator)
    for array in (arrays.scores, arrays.H, arrays.z):
        array.uniform_(generator=generator)
    if arrays.history is not None:
        arrays.history.random_(0, 2**layer.policy.history_window, generator=generator)
    for run in layer.runs:
        count = run.layer.capacity
        # Each row and head in an order of its own.
        drawn = torch.rand(batch, run.heads, count, device=device, generator=generator)
        arrays.of_run(run).positions.copy_(drawn.argsort(2))
    lengths = torch.full((batch,), max(layer.capacities), dtype=torch.int32, device=device)
    return arrays, lengths


def tokens_for(
    layer: LayerConfig, batch: int, tokens: int, device: Any, generator: torch.Generator
) -> list[Tensor]:
    """q, k, v, strided as a model's projections are."""
    dtype = getattr(torch, layer.dtype)
    return [
        torch.randn(batch, tokens, heads, layer.head_dim, device=device, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        for heads in (layer.query_heads, layer.kv_heads, layer.kv_heads)
    ]


def copied(arrays: LayerArrays) -> LayerArrays:
    """The same in memory of its own."""
    return LayerArrays(**{name: array.clone() for name, array in arrays.named().items()})


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Print the rows, and write them where the run collects them."""
    for row in rows:
        print(json.dumps(row), flush=True)
    if path is not None:
        path.write_text(json.dumps({"rows": rows}) + "\n")
