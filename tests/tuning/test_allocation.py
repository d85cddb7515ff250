"""Bytes go where one more slot saves most, and layers take the way that adds least."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from less_cache.tuning.allocation import Offer, Plan, choose, hand_out, lower_hull

curves = st.dictionaries(st.sampled_from([1, 2, 4, 7]), st.floats(0, 1), min_size=1)


def offer(curves, slot_bytes=1, fixed_bytes=0):
    return Offer(lc.SinkWindow(), None, 0, curves, slot_bytes, fixed_bytes)


def loss_of(offers, capacities):
    """By the definition: on each head's hull, in lines between its corners."""
    total = 0.0
    for own, row in zip(offers, capacities, strict=True):
        for curve, slots in zip(own.curves, row, strict=True):
            hull = lower_hull("", curve)
            left = max(point for point in hull if point[0] <= slots)
            right = min((point for point in hull if point[0] >= slots), default=left)
            share = (slots - left[0]) / max(1, right[0] - left[0])
            total += left[1] + share * (right[1] - left[1])
    return total


def test_the_copying_head_gets_the_slots():
    flat, steep = {8: 0.001, 64: 0.0}, {8: 0.9, 16: 0.5, 64: 0.1}
    found = hand_out([offer([flat, steep]), offer([flat, flat])], 8 * 4 + 40)
    assert found.capacities == [[8, 48], [8, 8]]


def test_slots_that_cost_less_are_worth_more():
    curve = {1: 1.0, 101: 0.0}
    dear, cheap = offer([curve], slot_bytes=4), offer([curve], slot_bytes=2)
    assert hand_out([dear, cheap], 6 + 100).capacities == [[1], [51]]


@given(
    losses=st.lists(st.lists(curves, min_size=1, max_size=3), min_size=1, max_size=2),
    cost=st.integers(1, 3),
    more=st.integers(0, 30),
)
def test_no_more_bytes_than_there_are_and_more_never_hurt(losses, cost, more):
    offers = [offer(row, slot_bytes=cost, fixed_bytes=5) for row in losses]
    total = sum(min(curve) * cost for row in losses for curve in row) + 5 * len(offers) + more
    found = hand_out(offers, total)
    assert found.nbytes <= total
    assert found.loss == pytest.approx(loss_of(offers, found.capacities))
    for row, kept in zip(losses, found.capacities, strict=True):
        for curve, slots in zip(row, kept, strict=True):
            assert min(curve) <= slots <= max(curve)
    assert hand_out(offers, total + 1).loss <= found.loss + 1e-12


@given(row=st.lists(curves, min_size=2, max_size=3), more=st.integers(0, 12))
def test_nothing_handed_out_otherwise_is_better(row, more):
    own = offer(row)
    total = sum(map(min, row)) + more
    best = hand_out([own], total).loss
    for kept in itertools.product(*(range(min(curve), max(curve) + 1) for curve in row)):
        if sum(kept) <= total:
            assert (
                best
                <= loss_of(
                    [own],
                    [[min(k, max(lower_hull("", c))[0]) for k, c in zip(kept, row, strict=True)]],
                )
                + 1e-9
            )


def test_each_layer_takes_the_way_that_adds_least():
    plain = offer([{10: 0.5, 100: 0.0}])
    state = offer([{10: 0.1, 100: 0.0}], fixed_bytes=20)
    useless = offer([{10: 0.5, 100: 0.0}], fixed_bytes=20)
    found = choose([[plain, state], [plain, useless]], 60)
    assert [own.fixed_bytes for own in found.offers] == [20, 0]
    assert found.nbytes <= 60


def test_a_way_that_does_not_fit_is_not_taken():
    plain, dear = offer([{10: 0.5}]), offer([{10: 0.0}], slot_bytes=9)
    assert choose([[dear, plain]], 50).offers[0] is plain
    with pytest.raises(ValueError, match="total: got 5, expected at least"):
        choose([[dear, plain]], 5)


@given(
    st.lists(st.lists(curves, min_size=1, max_size=1), min_size=2, max_size=2), st.integers(14, 40)
)
def test_choosing_is_no_worse_than_any_one_way_for_all(losses, total):
    ways = [[offer(row), offer(row, fixed_bytes=2), offer(row, slot_bytes=2)] for row in losses]
    best = choose(ways, total).loss
    for place in range(3):
        now = [row[place] for row in ways]
        fewest = Plan(now, [[min(c) for c in own.curves] for own in now], 0.0).nbytes
        if fewest <= total:
            assert best <= hand_out(now, total).loss + 1e-12


def test_too_few_bytes_and_missing_measurements_are_told():
    with pytest.raises(ValueError, match="total: got 15, expected at least 16 bytes"):
        hand_out([offer([{8: 0.1}, {8: 0.2}])], 15)
    with pytest.raises(ValueError, match="curves: head 1 has no points"):
        hand_out([offer([{8: 0.1}, {}])], 15)
    with pytest.raises(ValueError, match="curves: head 0 has NaN at 8 slots"):
        hand_out([offer([{8: float("nan")}])], 15)
    with pytest.raises(ValueError, match="total"):
        hand_out([offer([{8: 0.1}])], 0)
