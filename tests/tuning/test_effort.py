"""Text is dealt out so that validation is of other text than all else."""

import pytest
import torch

from less_cache.tuning.effort import Effort, effort_within, split


def test_validation_shares_no_sequence_with_the_rest():
    tokens = torch.arange(100).view(50, 2)
    parts = split(tokens, Effort(calibration=7, measuring=5, fitting=20, validation=9))
    assert {name: len(part) for name, part in parts.items()} == {
        "calibration": 7,
        "measuring": 5,
        "refining": 5,
        "fitting": 20,
        "distilling": 41,
        "validation": 9,
    }
    kept = set(parts.pop("validation")[:, 0].tolist())
    for part in parts.values():
        assert not kept & set(part[:, 0].tolist())
        assert len(set(part[:, 0].tolist())) == len(part)


def test_little_text_is_used_twice_but_never_for_validation():
    parts = split(torch.arange(20).view(10, 2), Effort())
    assert len(parts["validation"]) == 2
    assert len(parts["fitting"]) == len(parts["measuring"]) == 8
    with pytest.raises(ValueError, match="tokens: got 7 sequences, expected at least 8"):
        split(torch.zeros(7, 2), Effort())


def test_the_most_that_fits_is_taken():
    usual = Effort()
    need = usual.seconds(6, 0.1)
    assert effort_within(need / 60 * 1.01, 6, 0.1) == usual.scaled(1.0)
    assert effort_within(need / 60 * 0.6, 6, 0.1).steps < usual.steps
    assert effort_within(1e-3, 6, 0.1) == usual.scaled(0.25)
    with pytest.raises(ValueError, match="minutes"):
        effort_within(0, 6, 0.1)


@pytest.mark.parametrize("name", ["calibration", "measuring", "fitting", "validation", "batch"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=name):
        Effort(**{name: 0})
