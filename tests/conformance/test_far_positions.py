"""Far along a sequence, where float32 has no more room for every position, nothing changes."""

import numpy as np
import pytest

import less_cache as lc
from less_cache.arrays import EMPTY, MAX_SHORT_TOKENS, MAX_TOKENS
from tests.conformance.cases import Runner, each_case
from tests.helpers import random_inputs, random_maps

C = 6
TOKENS = (1, 4, 1, 1)
PREFIX = 2 * C
POLICIES = [lc.SinkWindow(sinks=1, recent=2), lc.TOVA()]
STARTS = [2**24 - PREFIX - 3, 2**25 + 3, MAX_TOKENS - PREFIX - sum(TOKENS)]


def move(layer, policy, offset):
    """Let a layer have seen `offset` more tokens, none of which it holds."""
    far = layer.positions >= policy.sinks
    layer.positions[far] += offset
    layer.length += offset
    layer.tokens_bound += offset
    if isinstance(policy, lc.SinkWindow) and layer.scores is not None:
        layer.scores[...] = layer.positions
        layer.scores[layer.positions == EMPTY] = 0


@each_case(lambda case: case.wide)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_a_sequence_goes_on_as_it_would_near_its_start(start, policy, case):
    config = lc.CacheConfig(1, 4, 2, 4, C, policy, rank=2)
    maps = random_maps(config)
    near, far = (Runner(case, config, maps, 2) for _ in range(2))
    rng = np.random.default_rng(0)
    prefix = random_inputs(config, 2, PREFIX, rng)
    for runner in (near, far):
        runner.attend(*prefix)
    move(far.state.layers[0], policy, start)
    for count in TOKENS:
        inputs = random_inputs(config, 2, count, rng)
        np.testing.assert_array_equal(far.attend(*inputs), near.attend(*inputs))
        layer, moved = near.state.layers[0], far.state.layers[0]
        expected = np.array(layer.positions.tolist())
        expected[expected >= policy.sinks] += start
        assert np.sort(moved.positions.tolist(), 1).tolist() == np.sort(expected, 1).tolist()
        assert moved.length.tolist() == [n + start for n in layer.length.tolist()]


@each_case(lambda case: case.wide)
@pytest.mark.parametrize("policy", [*POLICIES, lc.H2O()], ids=str)
def test_positions_of_16_bits_do_as_those_of_32_to_the_last_token(policy, case):
    codes = {"rank": 2, "quantization": lc.Quantization(3, 3)}
    wide = lc.CacheConfig(1, 4, 2, 4, C, policy, max_positions=MAX_SHORT_TOKENS + 1, **codes)
    short = wide.replace(max_positions=MAX_SHORT_TOKENS)
    assert wide.layer(0).slot_bytes - short.layer(0).slot_bytes == 2
    maps = random_maps(short)
    runners = [Runner(case, config, maps, 2) for config in (short, wide)]
    rng = np.random.default_rng(0)
    prefix = random_inputs(short, 2, PREFIX, rng)
    for runner in runners:
        runner.attend(*prefix)
        move(runner.state.layers[0], policy, MAX_SHORT_TOKENS - PREFIX - sum(TOKENS))
    layer, other = (runner.state.layers[0] for runner in runners)
    assert [str(x.positions.dtype)[-5:] for x in (layer, other)] == ["int16", "int32"]
    for count in TOKENS:
        inputs = random_inputs(short, 2, count, rng)
        np.testing.assert_array_equal(*(runner.attend(*inputs) for runner in runners))
        assert layer.positions.tolist() == other.positions.tolist()
    last = random_inputs(short, 2, 1, rng)
    with pytest.raises(ValueError, match=r"at most 32768: .*a larger max_positions makes them 32"):
        runners[0].attend(*last)
    runners[1].attend(*last)


@each_case(lambda case: case.dtype != "float64")
def test_sums_that_float32_can_no_longer_add_to_are_refused(case):
    config = lc.CacheConfig(1, 4, 2, 4, C, lc.H2O(), rank=0)
    runner = Runner(case, config, None, 2)
    rng = np.random.default_rng(0)
    runner.attend(*random_inputs(config, 2, PREFIX, rng))
    move(runner.state.layers[0], config.policy, 2**24 - PREFIX - 1)
    with pytest.raises(ValueError, match=r"H2O.* sums in float32, .* beyond 16777216; DecayedH2O"):
        runner.attend(*random_inputs(config, 2, 2, rng))
    runner.attend(*random_inputs(config, 2, 1, rng))


@each_case()
@pytest.mark.parametrize(
    "policy", [lc.SinkWindow(), lc.DecayedH2O(), lc.ObservationWindow()], ids=str
)
def test_more_tokens_than_positions_are_refused(policy, case):
    config = lc.CacheConfig(1, 4, 2, 4, C, policy, rank=0)
    runner = Runner(case, config, None, 2)
    rng = np.random.default_rng(0)
    runner.attend(*random_inputs(config, 2, PREFIX, rng))
    state = runner.state.layers[0]
    move(state, config.policy, MAX_TOKENS - PREFIX - 2)
    before = state.positions.tolist(), state.length.tolist()
    with pytest.raises(ValueError, match=f"^k: {MAX_TOKENS + 1} tokens in all, but a sequence has"):
        runner.attend(*random_inputs(config, 2, 3, rng))
    assert (state.positions.tolist(), state.length.tolist()) == before
    # Padding is no token, and the last two have room.
    runner.attend(*random_inputs(config, 2, 3, rng), np.array([[True, False, True]] * 2))
    with pytest.raises(ValueError, match="tokens in all"):
        runner.attend(*random_inputs(config, 2, 1, rng))
    assert state.length.tolist() == [MAX_TOKENS] * 2
    runner.state.reset()
    runner.attend(*random_inputs(config, 2, 3, rng))
