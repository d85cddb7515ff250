"""One layer on the Triton backend beside the float64 reference, compared after each call."""

from __future__ import annotations

import torch

import less_cache as lc
from less_cache.backends import reference
from less_cache.backends import triton as backend
from less_cache.config import LayerConfig
from less_cache.state import LayerState, allocate
from tests.helpers import assert_close, assert_same_state, held_by, random_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(**changes) -> lc.CacheConfig:
    """Two KV heads of 16, seven slots, rank 4, but for `changes`; `group` for query heads."""
    parameters = {
        "num_layers": 1,
        "kv_heads": 2,
        "head_dim": 16,
        "capacity": 7,
        "policy": lc.H2O(),
        "rank": 4,
        **changes,
    }
    group = parameters.pop("group", 1)
    return lc.CacheConfig(query_heads=group * parameters["kv_heads"], **parameters)


class Pair:
    """A layer's state on both backends, fed with the same numbers."""

    def __init__(self, config: lc.CacheConfig, batch: int, kind: str = "exp", seed: int = 0):
        self.layer: LayerConfig = config.layer(0)
        self.wide = config.replace(dtype="float64", state_dtype=None).layer(0)
        self.batch = batch
        self.state: LayerState = allocate(self.layer, batch, device=DEVICE)
        self.expected: LayerState = allocate(self.wide, batch)
        self.generator = torch.Generator().manual_seed(seed)
        maps = random_maps(config, kind, seed, hidden=24)
        self.maps = self.wide_maps = None
        if maps is not None:
            self.maps = backend.prepare_maps(maps[0], self.layer, DEVICE)
            self.wide_maps = reference.prepare_maps(maps[0], self.wide, "cpu")

    def inputs(self, tokens: int):
        """q, k, v in the layer's dtype, strided as a model's projections are."""
        heads = (self.layer.query_heads, self.layer.kv_heads, self.layer.kv_heads)
        return [
            torch.randn(self.batch, tokens, count, self.layer.head_dim, generator=self.generator)
            .to(getattr(torch, self.layer.dtype))
            .to(DEVICE)
            .transpose(1, 2)
            for count in heads
        ]

    def mask(self, tokens: int):
        return (torch.rand(self.batch, tokens, generator=self.generator) < 0.7).to(DEVICE)

    def check(self, call, arrays, mask, bound: float) -> None:
        """Make the call on both, and compare outputs and states."""
        out = call(self.layer, self.state, self.maps, *arrays, mask)
        wide = [array.cpu().double() for array in arrays]
        expected = reference.append(
            self.wide, self.expected, self.wide_maps, *wide, None if mask is None else mask.cpu()
        )
        assert_close(out.double().cpu().numpy(), expected.numpy(), bound, "out")
        assert_same_state(held_by(self.state), held_by(self.expected), bound)
