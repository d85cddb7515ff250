"""Factors find what heads lose together, and bytes follow."""

import pytest

import less_cache as lc
from less_cache.tuning.allocation import Offer, choose, plan_with
from less_cache.tuning.refining import LOOKED_AT, Factors, refine, trials

SLOTS = (4, 8, 16, 32, 64)


def offer(levels, bits=8, coding=0.0):
    """Heads whose losses fall as one over their slots, from `levels` on; a slot takes `bits`."""
    curves = [{slots: level * 4 / slots for slots in SLOTS} for level in levels]
    codes = lc.Quantization(bits, bits)
    return Offer(lc.SinkWindow(1), codes, 0, curves, slot_bytes=bits, coding=coding)


def together(truth, offers):
    """What whole caches lose, if heads and codes really lose `truth` times as much."""

    def measure(plan):
        mine = [
            next(own for own in row if own.quantization == taken.quantization)
            for row, taken in zip(truth.of(offers), plan.offers, strict=True)
        ]
        return plan_with(mine, plan.capacities).loss

    return measure


def test_what_is_lost_together_is_found():
    offers = [[offer([0.4, 0.4])], [offer([0.4, 0.4])]]
    truth = Factors([[1.0, 3.0], [0.5, 1.0]], [1.0, 1.0])
    apart = choose(offers, 560)
    found = refine(offers, apart, 560, together(truth, offers), rounds=2)
    for heads, real in zip(found.heads, truth.heads, strict=True):
        assert heads == pytest.approx(real)
    measure = together(truth, offers)
    again = choose(found.of(offers), 560)
    assert measure(again) < measure(apart)
    assert again.capacities[0][1] > again.capacities[0][0] > again.capacities[1][0]
    assert again.nbytes <= 560


def test_codes_that_lose_more_than_foreseen_are_given_more_bits():
    row = [offer([0.2], 8, coding=0.0), offer([0.2], 4, coding=0.02)]
    offers = [row, row]
    truth = Factors([[1.0], [1.0]], [4.0, 1.0])
    apart = choose(offers, 300)
    assert [own.slot_bytes for own in apart.offers] == [4, 4]
    found = refine(offers, apart, 300, together(truth, offers), rounds=2)
    assert found.codes == pytest.approx(truth.codes)
    assert [own.slot_bytes for own in choose(found.of(offers), 300).offers] == [8, 4]


def test_a_plan_that_is_no_better_is_not_taken():
    offers = [[offer([0.4, 0.1])]]
    seen = []

    def measure(plan):
        # Whatever follows the first plan loses more.
        seen.append(plan)
        return plan.loss + (len(seen) > 1)

    found = refine(offers, choose(offers, 300), 300, measure, rounds=3)
    assert found == Factors.ones(offers)
    # The first, both heads changed, and the one plan that followed.
    assert len(seen) == 4


def test_only_the_heads_that_matter_most_are_measured():
    many = LOOKED_AT + 8
    offers = [[offer([1.0 / (head + 1) for head in range(many)])]]
    truth = Factors([[2.0] * many], [1.0])
    measured = []
    refine(
        offers,
        choose(offers, many * 64),
        many * 64,
        lambda plan: measured.append(plan) or together(truth, offers)(plan),
        rounds=1,
    )
    assert len(measured) <= trials(offers, 1) == 2 + LOOKED_AT + 1
