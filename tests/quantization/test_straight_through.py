"""What is read through the codes is what slots give back, with a slope."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_cache.quantization import code_layout, codes
from less_cache.quantization.straight_through import read_back

BITS = [2, 3, 4, 8, (6, 4, 4, 3, 3, 2, 2, 0)]


def layout_of(bits, size=16):
    return code_layout("calibrated", bits, size)


def drawn(seed, size=16, count=5):
    found = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    found[0, 3] *= 40  # Clipped.
    found[1] = 0
    return found.requires_grad_()


@pytest.mark.parametrize("bits", BITS)
@given(seed=st.integers(0, 2**31))
def test_it_is_what_slots_give_back(bits, seed):
    layout, u = layout_of(bits), drawn(seed)
    held = codes.encode(layout, u.detach())
    torch.testing.assert_close(
        read_back(layout, u).detach(),
        codes.decode(layout, *held, torch.float64),
        rtol=1e-12,
        atol=1e-300,
    )


@pytest.mark.parametrize("bits", BITS)
def test_twice_the_pair_reads_as_twice_as_much(bits):
    # Euler's theorem: what is homogeneous of degree 1 has the slope of itself along the pair.
    layout, u = layout_of(bits), drawn(0)
    read = read_back(layout, u)
    (slope,) = torch.autograd.grad(read.sum(), u)
    assert torch.isfinite(slope).all()
    wanted = read.detach().sum(1)
    # The scale is rounded to 16 bits, and its slope is not.
    torch.testing.assert_close((slope * u.detach()).sum(1), wanted, rtol=2e-3, atol=2e-3)


def test_channels_that_are_not_stored_have_no_slope():
    layout, u = layout_of(BITS[-1]), drawn(1)
    read = read_back(layout, u)
    (slope,) = torch.autograd.grad(read.sum(), u)
    assert layout.stored == 14
    assert (read[:, 14:] == 0).all()
    assert (slope[:, 14:] == 0).all()
