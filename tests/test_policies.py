"""Policies as data, and each one's choice of victim followed by hand on the reference."""

from pathlib import Path

import numpy as np
import pytest

import less_cache as lc
from less_cache.backends import reference
from less_cache.policies import (
    Gain,
    Policy,
    Start,
    builtin,
    parse_policy,
    policy_from_dict,
    registry,
)
from tests.helpers import POLICIES, policy_id

BAD = {
    "sinks-negative": ("sinks", ValueError, lambda: lc.SinkWindow(sinks=-1)),
    "sinks-a-float": ("sinks", TypeError, lambda: lc.SinkWindow(sinks=1.0)),
    "recent-negative": ("recent", ValueError, lambda: lc.H2O(recent=-1)),
    "recent-a-bool": ("recent", TypeError, lambda: lc.H2O(recent=True)),
    "tova-without-the-current": ("recent", ValueError, lambda: lc.TOVA(recent=0)),
    "tova-undecided": ("recent", ValueError, lambda: lc.TOVA(recent=None)),
    "factor-0": ("factor", ValueError, lambda: lc.DecayedH2O(factor=0.0)),
    "factor-above-1": ("factor", ValueError, lambda: lc.DecayedH2O(factor=1.01)),
    "factor-as-text": ("factor", TypeError, lambda: lc.DecayedH2O(factor="0.9")),
    "window-0": ("window", ValueError, lambda: lc.Scissorhands(window=0)),
    "window-63": ("window", ValueError, lambda: lc.Scissorhands(window=63)),
}


@pytest.mark.parametrize(("argument", "error", "make"), BAD.values(), ids=BAD)
def test_bad_numbers_are_refused_by_name(argument, error, make):
    with pytest.raises(error, match=rf"^{argument}: "):
        make()


@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_policies_are_equal_by_value_and_round_trip(policy):
    assert policy_from_dict(policy.to_dict()) == policy
    assert hash(policy_from_dict(policy.to_dict())) == hash(policy)
    assert policy.to_dict()["name"] == policy_id(policy)


def test_the_suite_runs_each_policy_of_the_library():
    own = {
        name for name, policy in registry.POLICIES.items() if policy.__module__ == builtin.__name__
    }
    assert {policy_id(policy) for policy in POLICIES} == own


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_pages_name_each_policy(page):
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    assert [name for name in map(policy_id, POLICIES) if f"`{name}`" not in text] == []


def test_unknown_names_and_fields_are_refused():
    with pytest.raises(ValueError, match=r"^policy: got 'LRU'"):
        policy_from_dict({"name": "LRU"})
    with pytest.raises(ValueError, match=r"unknown field\(s\) \['window'\]"):
        policy_from_dict({"name": "H2O", "window": 3})
    with pytest.raises(ValueError, match=r"^policy: got None"):
        policy_from_dict({"recent": 1})


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("h2o", lc.H2O()),
        ("H2O:recent=3", lc.H2O(recent=3)),
        ("sink_window:sinks=2,recent=5", lc.SinkWindow(2, 5)),
        ("sink-window", lc.SinkWindow()),
        ("decayedh2o:factor=1", lc.DecayedH2O(factor=1.0)),
        ("decayedh2o:factor=0.5,recent=1", lc.DecayedH2O(factor=0.5, recent=1)),
        ("tova", lc.TOVA()),
        ("scissorhands:window=7", lc.Scissorhands(window=7)),
        ("keynorm", lc.KeyNorm()),
        ("observation_window:window=8,neighbours=3", lc.ObservationWindow(window=8, neighbours=3)),
        ("fullcache", lc.FullCache()),
    ],
)
def test_command_line_spellings_are_read(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize("text", ["", "lru", "h2o:recent", "h2o:recent=x", "h2o:recent=nan"])
def test_command_line_nonsense_is_refused(text):
    with pytest.raises(ValueError, match="policy"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("policy", "capacity", "recent"),
    [
        (lc.H2O(), 9, 4),
        (lc.H2O(), 10, 4),
        (lc.H2O(sinks=3), 10, 3),
        (lc.H2O(), 1, 0),
        (lc.Scissorhands(), 9, 4),
        (lc.SinkWindow(recent=None), 10, 5),
        (lc.H2O(recent=2), 9, 2),
    ],
)
def test_resolving_fills_in_the_recent_tokens(policy, capacity, recent):
    resolved = policy.resolve(capacity)
    assert resolved.recent == recent
    assert resolved.resolve(capacity) == resolved


def test_an_unresolved_number_is_not_guessed():
    with pytest.raises(ValueError, match=r"^recent: .*not resolved"):
        _ = lc.H2O().protected_recent


def test_only_a_base_policy_lacks_an_update():
    with pytest.raises(NotImplementedError, match="Policy must define update"):
        Policy().update(np, None, None, None, None)
    assert (Policy.starts, Policy.gains) == (Start.ZERO, Gain.GIVEN)


def run(policy, capacity, queries, keys):
    """Scalar heads of size 1: append tokens one by one, and list who is held after each."""
    config = lc.CacheConfig(1, 1, 1, 1, capacity, policy, rank=0, scale=1.0, dtype="float64")
    manager = lc.CacheManager(config, backend="reference")
    state = manager.init(1, dtype=np.float64)
    held = []
    for query, key in zip(queries, keys, strict=True):
        q, k = (np.full((1, 1, 1, 1), float(number)) for number in (query, key))
        manager.attend(state, 0, q, k, k)
        positions = state.layers[0].positions[0]
        held.append(sorted(positions[positions >= 0].tolist()))
    return held, state.layers[0]


def test_a_sink_window_keeps_the_first_and_the_last():
    held, _ = run(lc.SinkWindow(sinks=2), 4, [0] * 7, [0] * 7)
    assert held[3:] == [[0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 5], [0, 1, 5, 6]]


def test_the_largest_key_leaves_first():
    held, layer = run(lc.KeyNorm(recent=1), 3, [0] * 6, [1, -5, 2, 9, 0.5, 3])
    # Nine leaves only once it is no longer the last token.
    assert held[3:] == [[0, 2, 3], [0, 3, 4], [0, 4, 5]]
    assert layer.scores[0].tolist() == [-1.0, -0.5, -3.0]


def test_h2o_sums_what_attention_gave():
    # Keys 0, 2, 0, 0, 0; every query is 1: the second key draws most of the attention.
    held, layer = run(lc.H2O(recent=0), 3, [1] * 5, [0, 2, 0, 0, 0])
    e2 = np.exp(2.0)
    first = 1 + 1 / (1 + e2) + 1 / (2 + e2)
    second = e2 / (1 + e2) + e2 / (2 + e2)
    assert held == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4]]
    # Then two steps over 0, 2, 0: 2 and 3 left with the least scores.
    np.testing.assert_allclose(
        layer.scores[0], [first + 2 / (2 + e2), second + 2 * e2 / (2 + e2), 1 / (2 + e2)]
    )


def test_recent_tokens_are_protected_from_h2o():
    keys = [0, 2, 0, 0, 0, 0]
    assert run(lc.H2O(recent=0), 4, [1] * 6, keys)[0][4:] == [[0, 1, 2, 4], [0, 1, 2, 5]]
    held, _ = run(lc.H2O(recent=2), 4, [1] * 6, keys)
    assert held[4:] == [[1, 2, 3, 4], [1, 3, 4, 5]]


def test_decay_lets_old_attention_fade():
    def scores(factor):
        return run(lc.DecayedH2O(recent=0, factor=factor), 9, [1, 1, 1], [0, 0, 0])[1].scores[0]

    np.testing.assert_allclose(scores(1.0)[:3], [1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])
    np.testing.assert_allclose(
        scores(0.5)[:3], [(1 * 0.5 + 1 / 2) * 0.5 + 1 / 3, 1 / 2 * 0.5 + 1 / 3, 1 / 3]
    )


def test_tova_asks_the_last_query_alone():
    # The first key is loved by all queries but the last one before the eviction.
    held, _ = run(lc.TOVA(), 3, [5, 5, -5, 5], [1, 0, 0, 0])
    assert held[3] == [1, 2, 3]
    held, _ = run(lc.TOVA(), 3, [5, 5, 5, 5], [1, 0, 0, 0])
    assert held[3] == [0, 2, 3]


def test_scissorhands_counts_fair_shares_within_its_window():
    _, layer = run(lc.Scissorhands(recent=0, window=2), 9, [3, 3, 3, -3], [1, 0, 0, 0])
    # The first key had its share thrice, then lost it; only two queries are looked back on.
    assert layer.history[0, :4].tolist() == [0b10, 0b01, 0b01, 0b01]
    assert layer.scores[0, :4].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_a_full_cache_evicts_nothing():
    held, layer = run(lc.FullCache(), 5, [0] * 5, [0] * 5)
    assert held[-1] == [0, 1, 2, 3, 4]
    assert not layer.scores.any()


@pytest.mark.parametrize(
    ("scores", "positions", "sinks", "recent", "seen", "expected"),
    [
        ([3.0, 1.0, 2.0], [0, 1, 2], 0, 0, 3, 1),
        ([1.0, 1.0, 2.0], [5, 4, 6], 0, 0, 7, 1),
        ([1.0, 2.0, 3.0], [0, 1, 2], 1, 0, 3, 1),
        ([3.0, 2.0, 1.0], [0, 1, 2], 0, 1, 3, 1),
        ([3.0, 2.0, 1.0], [0, 1, 2], 0, 2, 3, 0),
        ([9.0, 2.0, 9.0], [7, 0, 3], 1, 1, 8, 2),
    ],
)
def test_the_victim_is_the_least_score_then_the_oldest_unprotected(
    scores, positions, sinks, recent, seen, expected
):
    policy = lc.SinkWindow(sinks=sinks, recent=recent)
    slot = reference.victim(np, policy, np.asarray(scores), np.asarray(positions), seen)
    assert slot == expected
