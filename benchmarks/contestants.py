"""The caches that the benchmarks compare, each behind the same `attend(layer, q, k, v)`.

Every contestant is made as if `context - 1` tokens had been decoded: filled with random keys and
values, without a prompt's computation. The step to be timed is always the one that brings the
sequence to `context` tokens; `rewind` makes ready for the same step again, outside the timing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache

import less_cache as lc
from examples.custom_loop import Shape
from less_cache.arrays import EMPTY
from less_cache.policies import Policy
from less_cache.quantization.transforms import hadamard_transforms


class Contestant(Protocol):
    """One cache of one size, ready for a decode step."""

    @property
    def nbytes(self) -> int:
        """Bytes the cache takes when it holds `context` tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take the new pair in, and attend: [B, H, 1, D] -> [B, H, 1, D]."""

    def rewind(self) -> None:
        """Undo the last step as far as the next one's cost depends on it."""


class Less:
    """`CacheManager`: at rank 0 the eviction policy alone.

    Parameters
    ----------
    shape
        Of the model.
    context, batch
        Tokens a sequence, and sequences.
    capacity, policy, rank, hidden, quantization
        As of `CacheConfig`.
    backend
        As of `CacheManager`.
    """

    def __init__(
        self,
        shape: Shape,
        context: int,
        batch: int,
        *,
        capacity: int,
        policy: Policy,
        rank: int = 8,
        hidden: int = 128,
        quantization: lc.Quantization | None = None,
        backend: str = "auto",
    ) -> None:
        self.config = lc.CacheConfig(
            num_layers=shape.layers,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            capacity=capacity,
            policy=policy,
            rank=rank,
            hidden=hidden,
            quantization=quantization,
        )
        maps = lc.FeatureMaps.initialise(self.config) if rank else None
        transforms = None
        if quantization is not None and quantization.transform == "calibrated":
            # Which bases they are makes no difference to a step's cost.
            bases = hadamard_transforms(shape.kv_heads, shape.head_dim)
            transforms = lc.Transforms("calibrated", [bases] * shape.layers)
        self.manager = lc.CacheManager(self.config, maps, backend=backend, transforms=transforms)
        self.state = self.manager.init(batch)
        last = torch.arange(context - 1 - capacity, context - 1)
        for layer in self.state.layers:
            for filled in (layer.keys, layer.values):
                filled.normal_() if quantization is None else filled.random_(256)
            for positive in (layer.scores, layer.H, layer.z, layer.key_scales, layer.value_scales):
                if positive is not None:
                    positive.uniform_()
            # Which positions are held makes no difference to a step's cost; a short sequence
            # leaves the slots before its first token empty.
            layer.positions.copy_(last.clamp_min(EMPTY).repeat(shape.kv_heads))
            layer.length.fill_(context - 1)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.manager.attend(self.state, layer, q, k, v)

    def rewind(self) -> None:
        """Nothing to undo: every step costs the same."""


class Dynamic:
    """transformers' `DynamicCache`, which grows, and PyTorch's fused attention."""

    def __init__(self, shape: Shape, context: int, batch: int) -> None:
        self.nbytes = full_bytes(shape, context, batch)
        self.context = context
        self.cache = DynamicCache()
        _fill(self.cache, shape, context, batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _fused_attention(q, *self.cache.update(k, v, layer))

    def rewind(self) -> None:
        self.cache.crop(self.context - 1 - self.cache.get_seq_length())


class Static:
    """transformers' `StaticCache` of exactly `context` tokens, and PyTorch's fused attention.

    After the timed step it is full, so that no mask is needed: the best case for it.
    """

    def __init__(self, shape: Shape, context: int, batch: int) -> None:
        self.nbytes = full_bytes(shape, context, batch)
        self.context = context
        config = LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.query_heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        self.cache = StaticCache(config, max_cache_len=context)
        _fill(self.cache, shape, context, batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _fused_attention(q, *self.cache.update(k, v, layer))

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context - 1)  # type: ignore[union-attr]


def full_bytes(shape: Shape, context: int, batch: int) -> int:
    """What a full cache of float32 holds after `context` tokens."""
    pair = 2 * shape.head_dim * torch.float32.itemsize
    return batch * context * shape.layers * shape.kv_heads * pair


def _fill(cache: Cache, shape: Shape, context: int, batch: int) -> None:
    size = (batch, shape.kv_heads, context - 1, shape.head_dim)
    keys, values = torch.randn(size), torch.randn(size)
    for layer in range(shape.layers):
        cache.update(keys, values, layer)


def _fused_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    grouped = q.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)
