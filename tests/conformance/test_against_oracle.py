"""Each backend does what the float64 NumPy reference does, whatever the cache and the input."""

import numpy as np
import pytest
from hypothesis import given, settings

import less_cache as lc
from tests.conformance.cases import ORACLE, BackendCase, Runner, each_case
from tests.conformance.scenarios import CloseCall, Scenario, scenarios
from tests.helpers import assert_close, assert_same_state


def follow(case: BackendCase, scenario: Scenario) -> None:
    """Append to the case and to the oracle, and compare after each call."""
    maps = scenario.maps(case)
    runner = Runner(case, scenario.config, maps, scenario.batch)
    oracle = Runner(ORACLE, scenario.config, maps, scenario.batch)
    close = CloseCall()
    for layer, arrays, mask in scenario.appends(case):
        with close.watch():
            expected = oracle.attend(*arrays, mask, layer=layer)
        if close.met and not case.exact:
            return
        assert_close(runner.attend(*arrays, mask, layer=layer), expected, case.outputs, "out")
        assert_same_state(runner.held(layer), oracle.held(layer), case.state)


@each_case(lambda case: case.wide)
def test_outputs_and_states_are_the_oracles(case):
    @settings(max_examples=case.examples)
    @given(scenarios(case))
    def check(scenario):
        follow(case, scenario)

    check()


@each_case(lambda case: case.wide)
@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("policy", ["H2O", "TOVA", "Scissorhands", "DecayedH2O", "KeyNorm"])
def test_a_long_run_of_steps_after_a_prompt_follows_the_oracle(case, policy, kind):
    if policy not in case.policies or kind not in case.kinds:
        pytest.skip(f"{case.name} does not take {policy} or {kind}")
    config = lc.CacheConfig(
        1, 4, 2, case.head_dims[0], 7, getattr(lc, policy)(), rank=2, dtype=case.dtype
    )
    some, more = (4, 3) if case.interpreted else (12, 6)
    chunks = ((9, "left"), *((1, "none"),) * some, (5, "right"), *((1, "holes"),) * more)
    follow(case, Scenario(config, kind, batch=2, chunks=chunks, seed=3))


@each_case(lambda case: not case.wide)
def test_sixteen_bit_outputs_are_within_their_bound(case):
    # These policies evict by numbers that sixteen bits hold exactly, so no set can differ.
    @settings(max_examples=case.examples)
    @given(scenarios(case, names=("SinkWindow", "KeyNorm", "FullCache")))
    def check(scenario):
        follow(case, scenario)

    check()


@each_case(lambda case: "KeyNorm" in case.policies and "TOVA" in case.policies)
@pytest.mark.parametrize("policy", [lc.KeyNorm(), lc.TOVA(), lc.H2O(recent=2)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_ties_go_to_the_older_pair(case, policy, tokens):
    config = lc.CacheConfig(1, 2, 1, case.head_dims[0], 5, policy, rank=0, dtype=case.dtype)
    runner = Runner(case, config, None, 1)
    oracle = Runner(ORACLE, config, None, 1)
    rng = np.random.default_rng(0)
    # Equal keys: for every query all pairs weigh the same.
    for _ in range(12 // tokens):
        q = rng.normal(size=(1, 2, tokens, config.head_dim))
        k = np.ones((1, 1, tokens, config.head_dim))
        runner.attend(q, k, k)
        oracle.attend(q, k, k)
        np.testing.assert_array_equal(runner.held().positions, oracle.held().positions)
    if isinstance(policy, (lc.KeyNorm, lc.TOVA)):
        seen = 12 // tokens * tokens
        np.testing.assert_array_equal(runner.held().positions[0, 0], np.arange(seen - 5, seen))


@each_case(lambda case: case.wide)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("rank", [0, 2])
def test_logits_far_beyond_what_exp_holds_stay_finite(case, sign, tokens, rank):
    scenario = Scenario(
        lc.CacheConfig(
            1, 2, 1, case.head_dims[0], 4, lc.SinkWindow(sinks=1), rank=rank, dtype=case.dtype
        ),
        "paper" if "paper" in case.kinds else "exp",
        batch=1,
        chunks=((tokens, "none"),) * 8,
        seed=5,
    )
    maps = scenario.maps(case)
    runner, oracle = (Runner(c, scenario.config, maps, 1) for c in (case, ORACLE))
    for _, (q, k, v), _ in scenario.appends(case):
        # Every logit is near sign * 1000 or beyond, and differs from pair to pair.
        q, k = 20.0 + np.abs(q), sign * (20.0 + np.abs(k))
        q, k = case.rounded(q), case.rounded(k)
        # In float32 a logit of 1000 is known to 1e-4, and so is each probability.
        assert_close(
            runner.attend(q, k, v),
            oracle.attend(q, k, v),
            max(2e-3, case.outputs) if not case.exact else case.outputs,
            "out",
        )


@each_case()
def test_a_chunk_as_heavy_as_float16_cannot_sum_stays_finite(case):
    # 1024 equal weights on values of 100: their sum is beyond 65504, their mean is not.
    config = lc.CacheConfig(
        1, 1, 1, case.head_dims[0], 8, lc.SinkWindow(), rank=0, dtype=case.dtype
    )
    runner = Runner(case, config, None, 1)
    shape = (1, 1, 1024, config.head_dim)
    out = runner.attend(np.zeros(shape), np.zeros(shape), np.full(shape, 100.0))
    assert_close(out, np.full(shape, 100.0), case.outputs, "out")


@each_case(lambda case: not case.numpy)
def test_strided_inputs_are_read_as_they_are(case):
    config = lc.CacheConfig(
        1, 4, 2, case.head_dims[0], 5, lc.SinkWindow(), rank=0, dtype=case.dtype
    )
    whole = Runner(case, config, None, 2)
    rng = np.random.default_rng(0)
    q, k, v = (
        case.array(rng.normal(size=(2, 9, heads, config.head_dim))).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    other = Runner(case, config, None, 2)
    for tokens in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        views = [array[:, :, tokens] for array in (q, k, v)]
        out = whole.manager.attend(whole.state, 0, *views)
        expected = other.manager.attend(other.state, 0, *(view.clone() for view in views))
        assert_close(out.double().cpu().numpy(), expected.double().cpu().numpy(), 1e-6, "out")
