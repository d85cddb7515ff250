"""What a user may take for granted: exact limits, padding, chunking, beams."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import less_cache as lc
from less_cache.layer_maps import EXPONENT_LIMIT
from tests.conformance.cases import Runner, each_case
from tests.helpers import (
    POLICIES,
    assert_close,
    assert_same_state,
    policy_id,
    random_inputs,
    random_maps,
)

CUTS = ((12,), (1,) * 12, (5, 1, 4, 2))


def config_for(case, **changes):
    parameters = {
        "num_layers": 1,
        "query_heads": 2 * min(2, case.max_group),
        "kv_heads": 2,
        "head_dim": case.head_dims[0],
        "capacity": 7,
        "policy": lc.H2O(),
        "rank": min(2, case.max_rank),
        "dtype": case.dtype,
    }
    parameters.update(changes)
    return lc.CacheConfig(**parameters)


def exact_maps(config, vocabulary):
    """Maps with φ(q)·ψ(k) = exp(q·k·scale) for every key k of `vocabulary` [Hkv, R, D].

    gelu(x) - gelu(-x) = x, so two hidden units make any linear function: φ's exponents are
    q·k_j·scale, and ψ's are 0 at the key's own number and the clamp's -30 elsewhere.
    """
    tensors = {"psi_b": np.zeros((config.kv_heads, config.rank))}
    phi_lines, psi_lines = [], []
    for head in range(config.kv_heads):
        keys = vocabulary[head]
        own_number = 2 * EXPONENT_LIMIT * (np.eye(len(keys)) - 1.0)
        phi_lines += [keys.T * config.scale] * config.group
        psi_lines.append(np.linalg.pinv(keys) @ own_number)
    eye = np.eye(config.rank)
    for name, lines in (("phi", phi_lines), ("psi", psi_lines)):
        tensors[f"{name}_w1"] = np.stack([np.concatenate([a, -a], 1) for a in lines])
        tensors[f"{name}_w2"] = np.stack([np.concatenate([eye, -eye], 0)] * len(lines))
    return lc.FeatureMaps.from_tensors([tensors], kind="exp")


def causal_attention(config, q, k, v):
    """Plain full attention in float64."""
    k, v = (np.repeat(array, config.group, axis=1) for array in (k, v))
    logits = np.einsum("bhsd,bhtd->bhst", q, k) * config.scale
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights @ v) / weights.sum(-1, keepdims=True)


@each_case(lambda case: case.wide and "exp" in case.kinds and case.max_rank >= 3)
@pytest.mark.parametrize("policy", POLICIES[1:], ids=policy_id)
def test_less_is_full_attention_where_the_maps_are_exact(case, policy):
    if policy_id(policy) not in case.policies:
        pytest.skip(f"{case.name} does not take {policy}")
    config = config_for(case, policy=policy, rank=3)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(2, config.head_dim, config.head_dim)))[0]
    vocabulary = case.rounded(1.5 * basis[:, :3])
    numbers = rng.integers(0, 3, size=(2, 2, 40))
    k = np.stack([[vocabulary[head][numbers[b, head]] for head in range(2)] for b in range(2)])
    q, _, v = (case.rounded(array) for array in random_inputs(config, 2, 40, rng))
    expected = causal_attention(config, q, k, v)
    runner = Runner(case, config, exact_maps(config, vocabulary), 2)
    at = 0
    for tokens in (5, 1, 1, 1, 6, 1, 1, 12, 1, 1, 8, 1, 1):
        part = slice(at, at + tokens)
        out = runner.attend(*(array[:, :, part] for array in (q, k, v)))
        assert_close(out, expected[:, :, part], 1e-9 if case.exact else 2e-4, f"token {at}")
        at += tokens
    assert at == 40


@each_case(lambda case: "FullCache" in case.policies)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_full_cache_is_torchs_attention(case, group, scale):
    config = config_for(
        case, query_heads=2 * group, policy=lc.FullCache(), capacity=20, rank=0, scale=scale
    )
    rng = np.random.default_rng(1)
    q, k, v = (case.rounded(array) for array in random_inputs(config, 3, 20, rng))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.as_tensor, (q, k, v)), is_causal=True, enable_gqa=True, scale=config.scale
    ).numpy()
    runner = Runner(case, config, None, 3)
    for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 20)):
        out = runner.attend(*(array[:, :, part] for array in (q, k, v)))
        assert_close(out, expected[:, :, part], case.outputs, "out")


@each_case()
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_how_a_sequence_that_fits_is_cut_into_chunks_does_not_matter(case, policy):
    if policy_id(policy) not in case.policies:
        pytest.skip(f"{case.name} does not take {policy}")
    if isinstance(policy, lc.ObservationWindow):
        # What a call is matters to it, but not where every query votes for itself alone.
        policy = dataclasses.replace(policy, window=12, neighbours=1)
    config = config_for(case, policy=policy, capacity=12)
    maps = case.rounded_maps(random_maps(config, case.kinds[0]))
    rng = np.random.default_rng(2)
    arrays = [case.rounded(array) for array in random_inputs(config, 2, 12, rng)]
    runs = []
    for cuts in ((12,), (1, 1, 6, 1, 3)) if case.interpreted else CUTS:
        runner = Runner(case, config, maps, 2)
        outs, at = [], 0
        for tokens in cuts:
            outs.append(runner.attend(*(array[:, :, at : at + tokens] for array in arrays)))
            at += tokens
        runs.append((np.concatenate(outs, 2), runner.held()))
    for out, held in runs[1:]:
        assert_close(out, runs[0][0], case.outputs, "out")
        if case.wide:
            assert_same_state(held, runs[0][1], case.state)


@each_case()
def test_where_padding_stands_and_what_it_holds_does_not_matter(case):
    names = [p for p in POLICIES[1:] if policy_id(p) in case.policies]
    if not case.wide:
        names = [p for p in names if policy_id(p) in ("SinkWindow", "KeyNorm")]

    @settings(max_examples=max(5, case.examples // 3))
    @given(
        policy=st.sampled_from(names),
        chunks=st.lists(st.integers(1, 10), min_size=1, max_size=4),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(policy, chunks, seed):
        config = config_for(case, policy=policy)
        maps = case.rounded_maps(random_maps(config, case.kinds[-1]))
        plain, padded = (Runner(case, config, maps, 2) for _ in range(2))
        rng = np.random.default_rng(seed)
        for tokens in chunks:
            arrays = [case.rounded(array) for array in random_inputs(config, 2, tokens, rng)]
            width = tokens + int(rng.integers(0, 6))
            # Each row has its tokens in columns of its own.
            places = np.stack([np.sort(rng.permutation(width)[:tokens]) for _ in range(2)])
            mask = np.zeros((2, width), dtype=bool)
            np.put_along_axis(mask, places, True, axis=1)
            wider = []
            for array in arrays:
                wide = rng.choice(
                    [np.nan, np.inf, 1e4], size=(*array.shape[:2], width, array.shape[3])
                )
                np.put_along_axis(wide, places[:, None, :, None], array, axis=2)
                wider.append(wide)
            expected = plain.attend(*arrays)
            out = padded.attend(*wider, mask)
            assert (out[~np.broadcast_to(mask[:, None], out.shape[:3])] == 0).all()
            taken = np.take_along_axis(out, places[:, None, :, None], axis=2)
            assert_close(taken, expected, case.outputs, "out")
            assert_same_state(padded.held(), plain.held(), case.state)

    check()


@each_case()
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_rows_of_a_batch_do_not_see_each_other(case, policy):
    if policy_id(policy) not in case.policies:
        pytest.skip(f"{case.name} does not take {policy}")
    config = config_for(case, policy=policy, capacity=20 if policy == POLICIES[0] else 6)
    maps = case.rounded_maps(random_maps(config, case.kinds[0]))
    rng = np.random.default_rng(4)
    together = Runner(case, config, maps, 3)
    alone = [Runner(case, config, maps, 1) for _ in range(3)]
    for tokens in (5, 1, 1, 6, 1):
        arrays = [case.rounded(array) for array in random_inputs(config, 3, tokens, rng)]
        mask = rng.random((3, tokens)) < 0.8
        out = together.attend(*arrays, mask)
        for row, runner in enumerate(alone):
            single = runner.attend(*(array[row : row + 1] for array in arrays), mask[row : row + 1])
            assert_close(out[row : row + 1], single, case.outputs, f"row {row}")


@each_case()
@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_moving_rows_commutes_with_append(case, operation, tokens):
    config = config_for(case, policy=lc.SinkWindow(sinks=1))
    maps = case.rounded_maps(random_maps(config, case.kinds[0]))
    rows = {"reorder": [2, 0, 0], "select": [1, 1, 2, 0], "repeat": [0, 0, 1, 1, 2, 2]}[operation]
    rng = np.random.default_rng(5)
    moved_first, moved_last = (Runner(case, config, maps, 3) for _ in range(2))
    for length in (6, 1, 4):
        arrays = [case.rounded(array) for array in random_inputs(config, 3, length, rng)]
        mask = rng.random((3, length)) < 0.8
        moved_first.attend(*arrays, mask)
        moved_last.attend(*arrays, mask)

    def move(runner):
        if operation == "reorder":
            runner.state.reorder(rows)
        elif operation == "select":
            runner.state = runner.state.select(rows)
        else:
            runner.state = runner.state.repeat(2)

    arrays = [case.rounded(array) for array in random_inputs(config, 3, tokens, rng)]
    move(moved_first)
    first = moved_first.attend(*(array[rows] for array in arrays))
    last = moved_last.attend(*arrays)[rows]
    move(moved_last)
    assert_close(first, last, case.outputs, "out")
    assert_same_state(moved_first.held(), moved_last.held(), case.state)


@each_case()
def test_a_reset_state_is_a_new_one(case):
    config = config_for(case, policy=lc.Scissorhands(window=3))
    if "Scissorhands" not in case.policies:
        config = config_for(case)
    maps = case.rounded_maps(random_maps(config, case.kinds[0]))
    rng = np.random.default_rng(6)
    used, new = (Runner(case, config, maps, 2) for _ in range(2))
    used.attend(*random_inputs(config, 2, 11, rng))
    used.state.reset()
    for tokens in (4, 1, 9, 1):
        arrays = random_inputs(config, 2, tokens, rng)
        np.testing.assert_array_equal(used.attend(*arrays), new.attend(*arrays))


@each_case()
def test_all_padding_changes_nothing_at_all(case):
    config = config_for(case)
    maps = case.rounded_maps(random_maps(config, case.kinds[0]))
    rng = np.random.default_rng(7)
    runner = Runner(case, config, maps, 2)
    runner.attend(*random_inputs(config, 2, 9, rng))
    before = runner.held()
    for tokens in (1, 3):
        garbage = [np.full_like(array, np.nan) for array in random_inputs(config, 2, tokens, rng)]
        out = runner.attend(*garbage, np.zeros((2, tokens), dtype=bool))
        assert (out == 0).all()
        assert_same_state(runner.held(), before, 0.0)
