"""Bases: what goes in comes out, products stay, folded maps say the same, files hold everything."""

import dataclasses

import pytest
import torch

import less_cache as lc
from less_cache._tensor_files import read_tensors, write_tensors
from less_cache.quantization.calibration import Moments, fit_layer
from less_cache.quantization.transforms import (
    LayerTransforms,
    hadamard_matrix,
    hadamard_transforms,
    inverse,
)
from less_cache.teacher_forced import stored_pairs
from tests.helpers import random_maps
from tests.quantization.fitted import coded_config, fitted, some_tokens


@pytest.mark.parametrize("size", [1, 2, 7, 20, 64, 80, 96, 128])
def test_the_fixed_rotation_is_orthogonal_and_spreads_every_channel(size):
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=matrix.dtype))
    assert matrix.abs().max() * size**0.5 <= 2**0.5 + 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_what_enters_leaves_and_products_stay(kind):
    config = lc.CacheConfig(
        1, 4, 2, 16, capacity=9, policy=lc.H2O(), rank=0, quantization=lc.Quantization(3, 4, kind)
    )
    layer = hadamard_transforms(2, 16) if kind == "hadamard" else fitted(config)[0]
    q, k, v = some_tokens(config, 2, 11)
    inner_q, inner_k, inner_v, shift = layer.enter(q, k, v)
    torch.testing.assert_close(layer.leave_keys(inner_k), k)
    torch.testing.assert_close(layer.leave(inner_v), v)
    found = inner_q.view(2, 2, 2, 11, 16) @ inner_k.unsqueeze(2).transpose(3, 4)
    if shift is not None:
        found = found + shift.view(2, 2, 2, 11, 1)
    wanted = q.view(2, 2, 2, 11, 16) @ k.unsqueeze(2).transpose(3, 4)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("map_kind", ["paper", "exp"])
@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_folded_maps_say_of_inner_tokens_what_maps_say_of_outer_ones(kind, map_kind):
    config = lc.CacheConfig(
        1, 4, 2, 16, capacity=9, policy=lc.H2O(), rank=2, quantization=lc.Quantization(3, 4, kind)
    )
    layer = hadamard_transforms(2, 16) if kind == "hadamard" else fitted(config)[0]
    maps = random_maps(config, kind=map_kind).to(dtype=torch.float64)[0]
    q, k, v = some_tokens(config, 2, 5)
    inner_q, inner_k, _, _ = layer.enter(q, k, v)
    folded = layer.fold(maps)
    torch.testing.assert_close(folded.phi(inner_q), maps.phi(q))
    torch.testing.assert_close(folded.psi(inner_k), maps.psi(k))


def test_fitted_bases_lose_less_where_it_matters():
    """Errors of logits and outputs, against the fixed rotation at the same bits."""
    config = lc.CacheConfig(
        1, 4, 2, 32, capacity=9, policy=lc.H2O(), rank=0,
        quantization=lc.Quantization(3, 3, "calibrated"),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    skew = torch.randn(2, 32, 32, generator=draw, dtype=torch.float64).softmax(2) * 8
    q, k, v = some_tokens(config, 1, 4000)
    k, v = k @ skew, v @ skew
    sums = [Moments.empty(len(x[0]), 32) for x in (q, k, v)]
    for moments, vectors in zip(sums, (q, k, v), strict=True):
        moments.add(vectors)
    projection = torch.randn(64, 4, 32, generator=draw, dtype=torch.float64)
    layer = fit_layer(config.quantization, *sums, projection)
    fixed = dataclasses.replace(config.layer(0), quantization=lc.Quantization(3, 3))
    errors = []
    for spec, basis in ((config.layer(0), layer), (fixed, None)):
        stored_k, stored_v = stored_pairs(spec, k, v, basis)
        logits = q.view(1, 2, 2, -1, 32)[:, :, :, :200] @ (stored_k - k).unsqueeze(2).transpose(
            3, 4
        )
        # What is common to all pairs of a query changes no probability.
        logits = logits - logits.mean(4, keepdim=True)
        outputs = torch.einsum("bhnd,ogd->bhgno", stored_v - v, projection[:, ::2])
        errors.append((logits.square().mean(), outputs.square().mean()))
    assert errors[0][0] < 0.6 * errors[1][0]
    assert errors[0][1] < 0.6 * errors[1][1]


def test_files_hold_everything_and_refuse_what_is_damaged(tmp_path):
    config = lc.CacheConfig(
        2, 4, 2, 16, capacity=9, policy=lc.H2O(), rank=0,
        quantization=lc.Quantization(3, 4, "calibrated"),
    )  # fmt: skip
    made = fitted(config)
    made.save(tmp_path / "t.safetensors")
    read = lc.Transforms.load(tmp_path / "t.safetensors")
    assert read.digest == made.digest
    assert (read.kind, read.key_bits, read.value_bits, len(read)) == ("calibrated", 3, 4, 2)
    read.check_against(config)
    data = bytearray((tmp_path / "t.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "t.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        lc.Transforms.load(tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError):
        lc.Transforms.load(tmp_path / "none")


def mixed_config(**changes):
    codes = [
        None,
        lc.Quantization(3, 4, "calibrated"),
        lc.Quantization(4, 4),
        lc.Quantization(8, 4, "calibrated"),
    ]
    parameters = {"rank": 0, "quantization": codes, **changes}
    return lc.CacheConfig(4, 4, 2, 16, capacity=9, policy=lc.H2O(), **parameters)


def test_layers_may_have_other_bits_or_no_bases(tmp_path):
    config = mixed_config()
    made = fitted(config)
    assert [own is None for own in made] == [True, False, True, False]
    assert (made.key_bits, made.value_bits) == ((0, 3, 0, 8), 4)
    assert [made.bits_of(layer) for layer in range(4)] == [(0, 0), (3, 4), (0, 0), (8, 4)]
    made.check_against(config)
    made.save(tmp_path / "t.safetensors")
    read = lc.Transforms.load(tmp_path / "t.safetensors")
    assert read.digest == made.digest
    assert (read.key_bits, read.value_bits) == (made.key_bits, made.value_bits)
    assert [own is None for own in read] == [True, False, True, False]
    moved = lc.Transforms(made.kind, [made[1], None, None, made[3]], key_bits=[3, 0, 0, 8])
    assert moved.digest != made.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"without": "[0, 1, 2]"},
        {"without": "[0]"},
        {"without": "[0, 1, 2, 3]"},
        {"without": "[[0]]"},
        {"without": "5"},
        {"without": "[" * 100_000},
        {"layers": "5"},
        {"layers": str(10**12)},
        {"key_bits": "[3, 8]"},
        {"key_bits": '["3", 0, 0, 8]'},
        {"key_bits": "3.0"},
    ],
    ids=str,
)
def test_parts_that_disagree_are_refused(changes):
    tensors, header = fitted(mixed_config()).to_parts()
    with pytest.raises(ValueError, match=r"^here: "):
        lc.Transforms.from_parts("here", tensors, {**header, **changes})


def test_bases_that_a_layer_lacks_or_cannot_use_are_refused():
    config = mixed_config()
    made = fitted(config)
    codes = list(config.quantizations)
    for layer, other, told in (
        (1, lc.Quantization(3, 4), "transforms: some for layer 1, whose quantization is Quant"),
        (1, None, "transforms: some for layer 1, whose quantization is None"),
        (0, codes[1], "transforms: none for layer 0, whose quantization is Quant"),
        (3, codes[1], r"transforms: fitted for \(8, 4\) bits of keys and values in layer 3"),
    ):
        wrong = config.replace(quantization=[*codes[:layer], other, *codes[layer + 1 :]])
        with pytest.raises(ValueError, match=told):
            lc.CacheManager(wrong, transforms=made)
    with pytest.raises(ValueError, match="layers: got none"):
        lc.Transforms("calibrated", [None, None])
    with pytest.raises(ValueError, match="key_bits: got 2 entries, expected one, or 4"):
        lc.Transforms("calibrated", made.layers, key_bits=[3, 8])


def test_digests_are_those_of_earlier_versions():
    matrix = torch.arange(8, dtype=torch.float64).view(2, 2, 2)
    layer = LayerTransforms(matrix, matrix + 1, matrix[0], matrix, matrix + 2, None)
    made = lc.Transforms("calibrated", [layer, layer], key_bits=3, value_bits=4)
    assert made.digest == "4c4dc625d8f7ac88ed0e092e3ffee991c38086374bab6d02c16a7fcfcc05bd88"


def test_transforms_of_something_else_are_refused():
    config = lc.CacheConfig(
        2, 4, 2, 16, capacity=9, policy=lc.H2O(), rank=0,
        quantization=lc.Quantization(3, 4, "calibrated"),
    )  # fmt: skip
    made = fitted(config)
    with pytest.raises(ValueError, match=r"^transforms: got None"):
        lc.CacheManager(config)
    with pytest.raises(ValueError, match=r"^transforms: given, but"):
        lc.CacheManager(config.replace(quantization=None), transforms=made)
    other = config.replace(quantization=lc.Quantization(2, 4, "calibrated"))
    with pytest.raises(ValueError, match=r"^transforms: fitted for \(3, 4\)"):
        lc.CacheManager(other, transforms=made)
    with pytest.raises(ValueError, match=r"^transforms: got \(kind"):
        lc.CacheManager(config.replace(num_layers=1), transforms=made)
    with pytest.raises(ValueError, match=r"^quantization: .* cannot be had with KeyNorm"):
        config.replace(policy=lc.KeyNorm())
    with pytest.raises(TypeError, match=r"^quantization: got 3"):
        config.replace(quantization=3)


def test_inverses_are_not_stored_and_come_back(tmp_path):
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 4, 4, generator=draw).double()
    layer = LayerTransforms(matrix, inverse(matrix), None, matrix, inverse(matrix), None)
    made = lc.Transforms("calibrated", [layer])
    made.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < 2 * 2 * 16 * 4 + 1000
    read = lc.Transforms.load(tmp_path / "small.safetensors")
    assert read.digest == made.digest
    for name, tensor in layer.named().items():
        assert torch.equal(read[0].named()[name], tensor)
    # What is no inverse is kept as it is.
    other = lc.Transforms("calibrated", [dataclasses.replace(layer, key_out=matrix)])
    other.save(tmp_path / "other.safetensors")
    assert torch.equal(lc.Transforms.load(tmp_path / "other.safetensors")[0].key_out, matrix)


def test_fitted_bases_take_16_bits_a_number_in_files(tmp_path):
    config = coded_config(kind="calibrated")
    made = fitted(config)
    made.save(tmp_path / "fitted.safetensors")
    _, held = read_tensors(tmp_path / "fitted.safetensors")
    assert held["layers.0.key_in"].dtype == held["layers.0.value_in"].dtype == torch.float16
    assert "layers.0.key_out" not in held
    read = lc.Transforms.load(tmp_path / "fitted.safetensors")
    assert read.digest == made.digest
    for name, tensor in made[0].named().items():
        assert torch.equal(read[0].named()[name], tensor)


def test_channels_that_16_bits_would_bend_are_held_in_32():
    moments = Moments.empty(1, 4)
    moments.add(torch.diag(torch.tensor([1.0, 1e7, 1.0, 1.0])).double().view(1, 1, 4, 4))
    one = Moments.empty(1, 4)
    one.add(torch.eye(4, dtype=torch.float64).view(1, 1, 4, 4))
    codes = lc.Quantization(4, 4, "calibrated")
    layer = fit_layer(codes, one, moments, one, torch.ones(4, 1, 4))
    product = layer.key_in @ layer.key_out
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64).unsqueeze(0))
    assert not torch.equal(layer.key_in.half().double(), layer.key_in)


def test_a_base_without_an_inverse_is_told(tmp_path):
    path = tmp_path / "damaged.safetensors"
    tensors = {f"layers.0.{name}": torch.zeros(1, 2, 2) for name in ("key_in", "value_in")}
    header = {"kind": "calibrated", "layers": "1", "key_bits": "0", "value_bits": "0"}
    write_tensors(path, tensors, {"format": "less_cache.transforms.1", **header})
    with pytest.raises(ValueError, match=r"damaged: .*key_in has no inverse"):
        lc.Transforms.load(path)
