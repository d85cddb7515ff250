"""Codes: packing loses nothing, rounding loses what theory says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_cache.quantization import BITS, TRANSFORMS, Quantization, code_layout
from less_cache.quantization.codes import decode, encode, pack, unpack
from less_cache.quantization.transforms import hadamard_matrix

GAUSSIAN_ERROR = {2: 0.1188, 3: 0.0374, 4: 0.0115, 8: 8.77e-5}
"""Mean squared error of the best uniform quantiser for N(0, 1), by bits."""


def round_trip(layout, u):
    return decode(layout, *encode(layout, u), u.dtype)


@given(
    transform=st.sampled_from(TRANSFORMS),
    bits=st.sampled_from(BITS),
    head_dim=st.integers(1, 130),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(transform, bits, head_dim, seed):
    layout = code_layout(transform, bits, head_dim)
    highest = layout.highest[: layout.stored]
    drawn = np.random.default_rng(seed).random((3, 2, layout.stored)) * (highest + 1)
    codes = drawn.astype(np.uint8)
    packed = pack(layout, codes)
    assert packed.shape == (3, 2, layout.nbytes)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(layout, packed), codes)
    torch.testing.assert_close(pack(layout, torch.from_numpy(codes)), torch.from_numpy(packed))
    torch.testing.assert_close(unpack(layout, torch.from_numpy(packed)), torch.from_numpy(codes))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_bytes_are_what_the_bits_say(transform, bits, head_dim):
    layout = code_layout(transform, bits, head_dim)
    assert layout.nbytes == sum(plane.nbytes for plane in layout.planes)
    assert layout.nbytes == head_dim * bits // 8
    assert sum(layout.bits) == head_dim * bits
    assert [*layout.bits] == sorted(layout.bits, reverse=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_gaussian_numbers_lose_what_theory_says(bits, head_dim):
    u = np.random.default_rng(0).standard_normal((4000, head_dim))
    error = np.mean((round_trip(code_layout("hadamard", bits, head_dim), u) - u) ** 2)
    assert error <= 1.02 * GAUSSIAN_ERROR[bits]
    # A scale for each pair adapts to it: a little is won on theory, no more.
    assert error >= 0.85 * GAUSSIAN_ERROR[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["outliers", "means"])
def test_outliers_and_means_lose_little_more(bits, kind):
    """As Qwen's biases make keys: some channels far larger than the others, or far off zero."""
    draw = np.random.default_rng(1)
    k = draw.standard_normal((4000, 128))
    if kind == "outliers":
        k[:, [3, 40, 77]] *= 40
    else:
        k += draw.standard_normal(128) * np.where(draw.random(128) < 0.1, 60, 1)
    u = k @ hadamard_matrix(128).numpy()
    error = np.mean((round_trip(code_layout("hadamard", bits, 128), u) - u) ** 2)
    assert error <= 1.5 * GAUSSIAN_ERROR[bits] * np.mean(u**2)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros_and_extremes_stay_finite(library, bits):
    layout = code_layout("hadamard", bits, 16)
    zeros = library(np.zeros((2, 16)))
    assert bool((round_trip(layout, zeros) == 0).all())
    for size in (1e-300, 1e-30, 1e30, 1e300):
        found = np.asarray(round_trip(layout, library(np.full((2, 16), size))))
        assert np.isfinite(found).all()
        assert (np.abs(found) <= max(1e-7, 1.01 * size)).all()


@given(bits=st.sampled_from(BITS), head_dim=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_codes_of_both_libraries_agree(bits, head_dim, seed):
    u = np.random.default_rng(seed).standard_normal((5, head_dim)).astype(np.float32)
    layout = code_layout("hadamard", bits, head_dim)
    codes, scales = encode(layout, u)
    torch_codes, torch_scales = encode(layout, torch.from_numpy(u))
    np.testing.assert_allclose(torch_scales.numpy(), scales, rtol=1e-3)
    found = decode(layout, torch_codes, torch_scales, torch.float32).numpy()
    # A number at a level's edge, or a scale at one of float16's, may fall to either side.
    step = scales.astype(np.float32)[:, None] * 1.01
    assert (np.abs(found - decode(layout, codes, scales, np.float32)) <= step).all()


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("key_bits", lambda: Quantization(key_bits=5)),
        ("value_bits", lambda: Quantization(value_bits=0)),
        ("key_bits", lambda: Quantization(key_bits="4")),
        ("transform", lambda: Quantization(transform="dct")),
    ],
)
def test_bad_settings_are_refused_by_name(argument, make):
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: got"):
        make()


def test_settings_round_trip():
    chosen = Quantization(2, 4, "calibrated")
    assert Quantization.from_dict(chosen.to_dict()) == chosen
    with pytest.raises(ValueError, match=r"^quantization: got"):
        Quantization.from_dict({"bits": 3})
