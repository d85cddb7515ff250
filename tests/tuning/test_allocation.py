"""Slots go where one more saves most."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_cache.tuning.allocation import hand_out, predicted_loss

curves = st.dictionaries(st.sampled_from([1, 2, 4, 7]), st.floats(0, 1), min_size=1)


def test_the_copying_head_gets_the_slots():
    flat, steep = {8: 0.001, 64: 0.0}, {8: 0.9, 16: 0.5, 64: 0.1}
    assert hand_out([[flat, steep], [flat, flat]], 8 * 4 + 40) == [[8, 48], [8, 8]]


@given(
    losses=st.lists(st.lists(curves, min_size=1, max_size=3), min_size=1, max_size=2),
    more=st.integers(0, 30),
)
def test_all_slots_are_handed_out_and_none_twice(losses, more):
    fewest = sum(min(curve) for row in losses for curve in row)
    found = hand_out(losses, fewest + more)
    assert [len(row) for row in found] == [len(row) for row in losses]
    total = sum(map(sum, found))
    assert total <= fewest + more
    for row, kept in zip(losses, found, strict=True):
        for curve, slots in zip(row, kept, strict=True):
            assert min(curve) <= slots <= max(curve)
    # More slots never make it worse.
    again = hand_out(losses, fewest + more + 1)
    assert predicted_loss(losses, again) <= predicted_loss(losses, found) + 1e-12


@given(row=st.lists(curves, min_size=2, max_size=3), more=st.integers(0, 12))
def test_nothing_handed_out_otherwise_is_better(row, more):
    fewest = sum(map(min, row))
    best = predicted_loss([row], hand_out([row], fewest + more))
    for kept in itertools.product(*(range(min(curve), max(curve) + 1) for curve in row)):
        if sum(kept) <= fewest + more:
            assert best <= predicted_loss([row], [kept]) + 1e-9


def test_too_few_slots_and_missing_measurements_are_told():
    with pytest.raises(ValueError, match="slots: got 15, expected at least 16, the fewest"):
        hand_out([[{8: 0.1}, {8: 0.2}]], 15)
    with pytest.raises(ValueError, match="losses: layer 0, head 1 has no points"):
        hand_out([[{8: 0.1}, {}]], 15)
    with pytest.raises(ValueError, match="losses: layer 0, head 0 has NaN at 8 slots"):
        hand_out([[{8: float("nan")}]], 15)
    with pytest.raises(ValueError, match="slots"):
        hand_out([[{8: 0.1}]], 0)
