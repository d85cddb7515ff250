"""Intervals of means: documents are drawn, not tokens."""

import math

import pytest

from less_cache.evaluation.intervals import RESAMPLES, drawn_documents, estimated_mean


def test_parts_of_a_document_are_drawn_together():
    documents = [f"{i // 10}" for i in range(40)]
    values = [float(i // 10) for i in range(40)]
    found = estimated_mean(documents, values, [1] * 40)
    assert found.value == 1.5
    apart = estimated_mean([str(i) for i in range(40)], values, [1] * 40)
    assert apart.high - apart.low < (found.high - found.low) / 2
    assert found.low < apart.low < 1.5 < apart.high < found.high


def test_long_documents_count_more():
    assert estimated_mean(["a", "b"], [30.0, 2.0], [3, 1]).value == 8.0


def test_the_interval_is_that_of_known_draws():
    # Of 100 documents, half of them 1: the mean's error is half a tenth of 1.
    found = estimated_mean([str(i) for i in range(100)], [i % 2 for i in range(100)], [1] * 100)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_there_is_none_without_two_documents():
    found = estimated_mean(["a", "a", "b"], [1.0, 3.0, 0.0], [1, 1, 0])
    assert found.value == 2.0
    assert found.interval is None
    assert math.isnan(estimated_mean([], [], []).value)


def test_draws_are_of_all_documents_and_repeat():
    drawn = drawn_documents(7)
    assert drawn.shape == (RESAMPLES, 7)
    assert (drawn.sum(1) == 7).all()
    assert (drawn == drawn_documents(7)).all()
