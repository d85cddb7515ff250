"""`eviction_times` of all heads at once against the reference's steps."""

import pytest
import torch

import less_cache as lc
from less_cache.backends import reference
from less_cache.backends.torch import eviction_times

TOKENS = 40
POLICIES = (
    lc.H2O(),
    lc.DecayedH2O(factor=0.9, sinks=1),
    lc.TOVA(sinks=2),
    lc.Scissorhands(window=5),
    lc.KeyNorm(recent=2),
    lc.SinkWindow(sinks=1),
    lc.ObservationWindow(window=3, neighbours=3),
)
CODES = lc.Quantization(4, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_times_are_those_of_steps(policy, masked):
    codes = CODES if masked else None
    config = lc.CacheConfig(
        num_layers=1,
        query_heads=8,
        kv_heads=4,
        head_dim=8,
        capacity=[[9, 24, 9, 60]],
        policy=policy,
        rank=0,
        dtype="float64",
        quantization=codes,
        softcap=None if masked else 3.0,
    )
    generator = torch.Generator().manual_seed(5)
    q, k = (
        2 * torch.randn(3, heads, TOKENS, 8, generator=generator, dtype=torch.float64)
        for heads in (8, 4)
    )
    # Pairs that nobody attends to have scores of exactly 0: the older one leaves.
    k[0, :, ::2] = -40 * q[0, ::2].mean(1, keepdim=True)
    mask = torch.rand(3, TOKENS, generator=generator) < 0.7 if masked else None
    wanted = reference.eviction_times(config.layer(0), q, k, mask, prompt=1)
    found = eviction_times(config.layer(0), q, k, mask, prompt=1)
    assert found.dtype == torch.int32
    assert torch.equal(found, wanted)
    assert (found < TOKENS).any()


def test_blocks_of_queries_are_parts_of_the_whole(monkeypatch):
    config = lc.CacheConfig(1, 2, 2, 8, capacity=9, policy=lc.H2O(), rank=0)
    q, k = torch.randn(2, 1, 2, TOKENS, 8)
    whole = eviction_times(config.layer(0), q, k, None, prompt=1)
    monkeypatch.setattr("less_cache.backends.torch.scan.BLOCK_BYTES", 7 * 2 * TOKENS * 4)
    assert torch.equal(eviction_times(config.layer(0), q, k, None, prompt=1), whole)
