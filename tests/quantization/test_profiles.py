"""Bits go to the channels whose error falls most."""

import itertools
import json

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.quantization import code_layout
from less_cache.quantization.codes import decode, encode
from less_cache.quantization.profiles import ERRORS, profile_for
from less_cache.quantization.settings import CHANNEL_BITS, average_bits


def error(shares, profile):
    return sum(share * ERRORS[bits] for share, bits in zip(shares, profile, strict=True))


@pytest.mark.parametrize("average", [1, 1.5, 2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3])
def test_as_many_bits_as_asked_for_most_first(average, decay):
    variances = torch.exp(-decay * torch.arange(64.0)).expand(3, -1)
    profile = profile_for(variances, average)
    assert list(profile) == sorted(profile, reverse=True)
    assert average - 0.25 <= average_bits(profile) <= average
    lc.Quantization(profile, profile, "calibrated")


def test_no_other_profile_of_as_many_bits_is_much_better():
    variances = torch.exp(-0.1 * torch.arange(64.0)).unsqueeze(0)
    shares = [float(part.sum() / variances.sum()) for part in variances[0].tensor_split(8)]
    found = profile_for(variances, 2)
    falling = itertools.combinations_with_replacement(sorted(CHANNEL_BITS, reverse=True), 8)
    best = min(error(shares, p) for p in falling if sum(p) <= 16)
    assert error(shares, found) <= 1.15 * best


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_the_errors_are_those_of_the_codes(bits):
    layout = code_layout("calibrated", (bits,) * 8, 64)
    u = np.random.default_rng(0).standard_normal((4000, 64))
    error = np.mean((decode(layout, *encode(layout, u), u.dtype) - u) ** 2)
    # A scale for each pair adapts to it: a little is won on theory.
    assert 0.85 * ERRORS[bits] <= error <= 1.02 * ERRORS[bits]


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        ((4, 4, 4), "expected 8 numbers"),
        ((2, 2, 2, 2, 3, 2, 2, 2), "none larger than the one before"),
        ((5,) * 8, "expected 8 numbers of"),
        ((0,) * 8, "the first above 0"),
    ],
)
def test_other_profiles_are_refused(bits, told):
    with pytest.raises(ValueError, match=f"key_bits: got .*{told}"):
        lc.Quantization(bits, 3, "calibrated")


def test_a_rotation_has_no_channels_that_matter_more():
    with pytest.raises(ValueError, match=r"value_bits: got .*'hadamard' makes all channels alike"):
        lc.Quantization(3, (4,) * 8, "hadamard")


def test_a_profile_is_read_back():
    codes = lc.Quantization((6, 4, 4, 3, 3, 2, 2, 0), 3, "calibrated")
    assert lc.Quantization.from_dict(json.loads(json.dumps(codes.to_dict()))) == codes
    assert sum(code_layout("calibrated", codes.key_bits, 64).bits) == 64 * 3
