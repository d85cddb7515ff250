"""Coded configs, and bases fitted to random tokens that have means and uneven channels."""

from __future__ import annotations

import torch

import less_cache as lc
from less_cache.quantization.calibration import Moments, fit_layer
from less_cache.quantization.transforms import LayerTransforms
from tests.helpers import POLICIES

CODED = tuple(policy for policy in POLICIES if not isinstance(policy, lc.KeyNorm))
"""The policies that calibrated bases take."""


def coded_config(policy=CODED[2], bits=(3, 4), kind="hadamard", **changes):
    """A layer whose heads differ, with coded pairs."""
    parameters = {
        "num_layers": 1,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "capacity": 60 if not policy.evicts else [[7, 11]],
        "policy": policy,
        "rank": 2,
        "dtype": "float64",
        "quantization": lc.Quantization(*bits, kind),
    }
    return lc.CacheConfig(**{**parameters, **changes})


def some_tokens(config: lc.CacheConfig, batch: int, tokens: int, seed: int = 0):
    """Queries, keys and values, float64."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> torch.Tensor:
        shape = (batch, heads, tokens, config.head_dim)
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    channels = torch.linspace(0.3, 3.0, config.head_dim, dtype=torch.float64)
    q, k, v = drawn(config.query_heads), drawn(config.kv_heads), drawn(config.kv_heads)
    return q, (k + 2) * channels, (v - 1) * channels.flip(0)


def fitted(config: lc.CacheConfig, seed: int = 0) -> lc.Transforms:
    """Transforms for the layers of a config whose quantization is calibrated."""
    layers: list[LayerTransforms | None] = []
    for index, spec in enumerate(config.layers):
        if spec.quantization is None or spec.quantization.transform != "calibrated":
            layers.append(None)
            continue
        tokens = some_tokens(config, 1, 300, seed + index)
        sums = [Moments.empty(x.shape[1], config.head_dim) for x in tokens]
        for moments, vectors in zip(sums, tokens, strict=True):
            moments.add(vectors)
        draw = torch.Generator().manual_seed(index)
        shape = (24, spec.query_heads, spec.head_dim)
        projection = torch.randn(shape, generator=draw, dtype=torch.float64)
        layers.append(fit_layer(spec.quantization, *sums, projection))
    bits = [spec.quantization for spec in config.layers]
    return lc.Transforms(
        "calibrated",
        layers,
        key_bits=[own.key_bits if own else 0 for own in bits],
        value_bits=[own.value_bits if own else 0 for own in bits],
    )
