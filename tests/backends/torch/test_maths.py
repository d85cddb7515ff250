"""Small pieces that have an exact answer."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from less_cache.backends.torch.maths import popcount


@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=20))
def test_bits_are_counted(words):
    counted = popcount(torch.tensor(words))
    assert counted.tolist() == [word.bit_count() for word in words]
