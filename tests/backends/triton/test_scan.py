"""`eviction_times` of a whole sequence against step-by-step calls of the float64 reference."""

import itertools

import pytest
import torch

import less_cache as lc
from less_cache.arrays import empty_arrays
from less_cache.backends import reference
from less_cache.backends.triton.scan import eviction_times
from tests.backends.triton.oracle import DEVICE, config

TOKENS = 22
POLICIES = (
    lc.H2O(),
    lc.DecayedH2O(factor=0.9, sinks=1),
    lc.TOVA(),
    lc.Scissorhands(window=5),
    lc.KeyNorm(recent=2),
    lc.SinkWindow(sinks=1),
    lc.ObservationWindow(window=3, neighbours=3),
    lc.FullCache(),
)


def times_step_by_step(layer, q, k, mask, prompt):
    """One more than the last call that left the pair in a slot; padding: its own index."""
    batch, heads, tokens, _ = k.shape
    arrays = empty_arrays(layer, batch)
    times = torch.arange(tokens, dtype=torch.int32).repeat(batch, heads, 1)
    columns = [torch.nonzero(row)[:, 0] for row in mask]
    cuts = [0, *range(prompt, tokens + 1)]
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        keys = k[:, :, part]
        lengths = mask[:, :start].sum(1)
        reference.attend(
            layer, arrays, None, q[:, :, part], keys, keys, lengths=lengths, mask=mask[:, part]
        )
        for row in range(batch):
            for head in range(heads):
                positions = arrays.positions[row, layer.head_slots(head)]
                held = columns[row][positions[positions >= 0].long()]
                times[row, head, held] = stop
    # Until the prompt ends, nothing leaves.
    real = mask[:, None].expand_as(times) & (torch.arange(tokens) < prompt)
    return torch.where(real, times.clamp_min(prompt), times)


@pytest.mark.parametrize(
    ("prompt", "masked", "group", "capacity"),
    [(1, False, 1, 7), (9, True, 2, 7), (22, False, 1, 7), (4, True, 1, [[5, 12]])],
)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_times_are_those_of_steps(policy, prompt, masked, group, capacity):
    full = isinstance(policy, lc.FullCache)
    cache = config(
        policy=policy, rank=0, group=group, capacity=TOKENS if full else capacity, softcap=4.0
    )
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, TOKENS, 2 * group, 16, generator=generator).transpose(1, 2)
    k = torch.randn(1, TOKENS, 2, 16, generator=generator).transpose(1, 2)
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    if masked:
        mask = torch.rand(1, TOKENS, generator=generator) < 0.7
    wide = cache.with_dtype("float64").layer(0)
    expected = times_step_by_step(wide, q.double(), k.double(), mask, prompt)
    given = mask.to(DEVICE) if masked else None
    times = eviction_times(cache.layer(0), q.to(DEVICE), k.to(DEVICE), given, prompt=prompt)
    assert times.dtype == torch.int32
    assert torch.equal(times.cpu(), expected)


@pytest.mark.parametrize("prompt", [0, 5])
def test_a_prompt_outside_the_sequence_is_refused(prompt):
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="prompt"):
        eviction_times(config().layer(0), q, q, prompt=prompt)


def test_more_slots_than_registers_hold_are_refused():
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="capacity: got 5000, expected at most 4096"):
        eviction_times(config(capacity=5000).layer(0), q, q)


def test_more_tokens_than_a_full_cache_holds_are_refused():
    q = torch.zeros(1, 2, 9, 16)
    layer = config(policy=lc.FullCache(), capacity=8).layer(0)
    with pytest.raises(ValueError, match=r"k: 9 tokens, but .* holds at most capacity = 8"):
        eviction_times(layer, q, q)
