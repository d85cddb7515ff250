"""Steps over heads of several capacities, taken together, against the reference."""

import pytest
import torch

import less_cache as lc
from less_cache.backends.torch import coded
from tests.helpers import random_maps

CALLS = (14, 1, 1, 3, 1, 1, 1)


def run(config, backend, **given):
    """Outputs and arrays after a few calls on rows 2 and 0 of a pool."""
    maps = random_maps(config)
    layer = config.layer(0)
    plan = lc.plan_step(layer, maps[0], backend=backend)
    pool = lc.empty_arrays(layer, 3)
    lengths, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([2, 0])
    generator = torch.Generator().manual_seed(7)
    outs = []
    for count in CALLS:
        heads = (config.query_heads, config.kv_heads, config.kv_heads)
        new = [torch.randn(2, n, count, 8, generator=generator).double() for n in heads]
        outs.append(lc.step(plan, pool, *new, lengths=lengths, rows=rows))
        lengths += count
    return torch.cat(outs, 2), pool


@pytest.mark.parametrize("codes", [None, lc.Quantization(4, 2)], ids=["plain", "coded"])
@pytest.mark.parametrize("policy", [lc.DecayedH2O(), lc.SinkWindow(1), lc.Scissorhands(window=3)])
def test_heads_of_any_capacities_are_the_references(policy, codes, monkeypatch):
    # Every row a block of its own.
    monkeypatch.setattr(coded, "BLOCK_BYTES", 1)
    config = lc.CacheConfig(
        num_layers=1,
        query_heads=8,
        kv_heads=4,
        head_dim=8,
        capacity=[[9, 9, 12, 9]],
        policy=policy,
        rank=2,
        dtype="float64",
        quantization=codes,
    )
    wanted, held = run(config, "reference")
    found, pool = run(config, "torch")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    for name in ("H", "z"):
        torch.testing.assert_close(getattr(pool, name), getattr(held, name), rtol=0, atol=1e-9)
    for head in range(4):
        slots = config.layer(0).head_slots(head)
        # A slot's place is nobody's concern.
        kept = [x.positions[:, slots].sort(1).values for x in (pool, held)]
        assert torch.equal(*kept)
