"""Options of `Sampler` that need no model: what each keeps, and where numbers end."""

import numpy as np
import pytest

from exporters.onnx import Sampler

LOGITS = np.log(np.array([[0.05, 0.5, 0.25, 0.2]], np.float32))


def drawn(count=400, **options):
    """The tokens that come up in `count` draws."""
    sampler = Sampler(temperature=options.pop("temperature", 1.0), seed=1, **options)
    return {int(sampler.choose(LOGITS)[0]) for _ in range(count)}


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-300, 1e-30])
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    logits = np.array([[3.0, 40.0, -7.0, 39.0], [1e30, -1e30, 0.0, 1.0]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        chosen = Sampler(temperature=temperature, seed=0).choose(logits)
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, {0, 1, 2, 3}), (0.2, {1, 2, 3}), (0.45, {1, 2}), (1.0, {1})]
)
def test_min_p_is_relative_to_the_likeliest(min_p, kept):
    assert drawn(min_p=min_p) == kept


def test_a_low_temperature_makes_min_p_stricter():
    """As elsewhere, the probabilities that count are those at this temperature."""
    assert drawn(min_p=0.3) == {1, 2, 3}
    assert drawn(min_p=0.3, temperature=0.5) == {1}


def test_options_are_taken_together():
    assert drawn(min_p=0.2, top_k=2) == {1, 2}
    assert drawn(min_p=0.2, top_p=0.6) == {1, 2}
    assert drawn(top_k=9) == {0, 1, 2, 3}


@pytest.mark.parametrize("min_p", [-0.1, 1.1, float("nan"), "0.1"])
def test_min_p_is_checked(min_p):
    with pytest.raises((TypeError, ValueError), match="min_p: got"):
        Sampler(min_p=min_p)
