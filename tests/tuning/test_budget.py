"""A budget is bytes, in whatever way they are spelled."""

import pytest

import less_cache as lc
from less_cache.tuning.budget import parse_budget

CONFIG = lc.CacheConfig(6, 4, 4, 64, capacity=8, policy=lc.SinkWindow(), rank=0)


def test_shares_are_of_the_full_cache_in_16_bits():
    wanted = 13107 * 24
    for spelled in ("5%", " 5 %", 0.05, "0.05"):
        assert abs(parse_budget(spelled, CONFIG, 1024) - wanted) < 24


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [(300000, 300000), ("300000", 300000), ("300k", 300000), ("2.5M", 2500000)],
)
def test_bytes(spelled, wanted):
    assert parse_budget(spelled, CONFIG, 1024) == wanted


@pytest.mark.parametrize(
    "wrong", ["", "x", "5 %%", "-3", 0, 0.0, "120%", "1G", float("nan"), 10**9]
)
def test_what_is_none_is_told(wrong):
    with pytest.raises(ValueError, match="budget: got"):
        parse_budget(wrong, CONFIG, 1024)


@pytest.mark.parametrize("wrong", [None, True, [5]])
def test_other_kinds_are_told(wrong):
    with pytest.raises(TypeError, match="budget: got"):
        parse_budget(wrong, CONFIG, 1024)
