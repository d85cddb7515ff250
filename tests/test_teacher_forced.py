"""The teacher-forced form gives what `attend` gives token by token."""

from __future__ import annotations

import pytest
import torch

import less_cache as lc
from less_cache import teacher_forced
from tests.helpers import POLICIES, policy_id, random_maps

TOKENS = 40


def inputs(config: lc.CacheConfig, batch: int = 2) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(batch, heads, TOKENS, config.head_dim, dtype=torch.float64, generator=draws)
        for heads in (config.query_heads, config.kv_heads, config.kv_heads)
    )


def configured(policy: lc.Policy, rank: int = 3, **changes) -> lc.CacheConfig:
    capacity = TOKENS if isinstance(policy, lc.FullCache) else 9
    return lc.CacheConfig(1, 4, 2, 8, capacity, policy, rank=rank, dtype="float64", **changes)


def token_by_token(config, maps, q, k, v, prompt):
    manager = lc.CacheManager(config, maps, backend="torch")
    state = manager.init(len(q))
    stops = [prompt, *range(prompt + 1, TOKENS + 1)]
    starts = [0, *stops[:-1]]
    outputs = [
        manager.attend(state, 0, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
        for a, b in zip(starts, stops, strict=True)
    ]
    return torch.cat(outputs, 2), state


@pytest.mark.parametrize("prompt", [1, 6, 9, 10, 30])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_equals_append(policy, prompt):
    config = configured(policy, softcap=5.0 if prompt == 6 else None)
    kind = "paper" if prompt == 9 else "exp"
    maps = random_maps(config, kind)
    q, k, v = inputs(config)
    wanted, _ = token_by_token(config, maps, q, k, v, prompt)
    spec = config.layer(0)
    layer_maps = maps[0].to(dtype=torch.float64)
    times = teacher_forced.eviction_times(spec, q, k, prompt=prompt)
    found = teacher_forced.attend(spec, layer_maps, q, k, v, times)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", [lc.SinkWindow(sinks=2), lc.H2O()], ids=policy_id)
def test_rank_zero_equals_append(policy):
    config = configured(policy, rank=0)
    q, k, v = inputs(config)
    wanted, _ = token_by_token(config, None, q, k, v, 1)
    times = teacher_forced.eviction_times(config.layer(0), q, k)
    found = teacher_forced.attend(config.layer(0), None, q, k, v, times)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_times_name_the_pairs_that_are_held_at_the_end(policy):
    config = configured(policy, rank=0)
    q, k, v = inputs(config)
    _, state = token_by_token(config, None, q, k, v, 1)
    times = teacher_forced.eviction_times(config.layer(0), q, k)
    for row in range(len(q)):
        for head in range(config.kv_heads):
            held = state.layers[0].positions[row, config.layer(0).head_slots(head)]
            stays = (times[row, head] == TOKENS).nonzero().flatten()
            assert sorted(held[held >= 0].tolist()) == stays.tolist()


def test_rows_and_blocks_are_parts_of_the_whole():
    config = configured(lc.H2O())
    maps = random_maps(config)[0].to(dtype=torch.float64)
    q, k, v = inputs(config)
    spec = config.layer(0)
    times = teacher_forced.eviction_times(spec, q, k)
    whole = teacher_forced.attend(spec, maps, q, k, v, times)
    rows = torch.tensor([30, 3, 17])
    some = teacher_forced.attend(spec, maps, q, k, v, times, rows)
    torch.testing.assert_close(some, whole[:, :, rows])
    with torch.no_grad():
        blocks = teacher_forced.attend_all(spec, maps, q, k, v, times, block=7)
    torch.testing.assert_close(blocks, whole)


def test_gradients_reach_every_parameter_and_agree_between_the_two_forms():
    config = configured(lc.H2O())
    q, k, v = inputs(config)
    spec = config.layer(0)
    times = teacher_forced.eviction_times(spec, q, k)
    gradients = []
    for form in (teacher_forced.attend, teacher_forced.attend_all):
        maps = random_maps(config, "paper")[0].to(dtype=torch.float64)
        for tensor in maps.tensors.values():
            tensor.requires_grad_()
        form(spec, maps, q, k, v, times).square().sum().backward()
        gradients.append({name: t.grad for name, t in maps.tensors.items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_refuses_a_prompt_longer_than_the_sequence():
    config = configured(lc.H2O())
    q, k, _ = inputs(config)
    with pytest.raises(ValueError, match="prompt"):
        teacher_forced.eviction_times(config.layer(0), q, k, prompt=TOKENS + 1)
