"""`Sampler`: how tokens are chosen from logits."""

import numpy as np
import pytest

from exporters.common.sampling import Sampler


def test_sampling_follows_its_distribution_and_seed():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 0)
    sampler = Sampler(temperature=1.0, seed=3)
    shares = np.bincount(sampler.choose(logits), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    again = Sampler(temperature=1.0, seed=3)
    np.testing.assert_array_equal(
        again.choose(logits), Sampler(temperature=1.0, seed=3).choose(logits)
    )
    assert set(Sampler(temperature=1.0, top_k=2, seed=0).choose(logits)) == {0, 1}
    assert set(Sampler(temperature=1.0, top_p=0.79, seed=0).choose(logits)) == {0, 1}
    assert set(Sampler(temperature=1.0, top_p=0.01, seed=0).choose(logits)) == {0}
    assert set(Sampler().choose(logits)) == {0}
    cold = Sampler(temperature=0.05, seed=0).choose(logits)
    assert (cold == 0).mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_samplers_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)
