"""One layer's maps: the formulas, their limits, their dtypes."""

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.backends import reference
from tests.helpers import tensors_of


@pytest.mark.parametrize("kind", ["paper", "exp"])
def test_the_formulas_are_the_papers_and_ours(kind):
    tensors = {name: tensor.double() for name, tensor in tensors_of(kind).items()}
    maps = lc.FeatureMaps.from_tensors([tensors])[0]
    gelu = torch.nn.functional.gelu
    q, k = torch.randn(3, 4, 5, 4).double(), torch.randn(3, 2, 5, 4).double()
    t = tensors
    for head in range(4):
        inner = gelu(q[:, head] @ t["phi_w1"][head]) @ t["phi_w2"][head]
        expected = inner.exp() if kind == "exp" else gelu(inner).abs()
        torch.testing.assert_close(maps.phi(q)[:, head], expected)
    for head in range(2):
        inner = gelu(k[:, head] @ t["psi_w1"][head]) @ t["psi_w2"][head]
        if kind == "exp":
            expected = (inner + t["psi_b"][head]).exp()
        else:
            u = t["psi_s1"][head].abs() * gelu(inner)
            expected = (u + (u @ t["psi_w3"][head]) * t["psi_s2"][head]).abs()
        torch.testing.assert_close(maps.psi(k)[:, head], expected)
        weights = {"kind": kind, **{n: a.numpy()[head] for n, a in t.items() if n[:3] == "psi"}}
        oracle = reference.psi(np, weights, k[0, head].numpy())
        np.testing.assert_allclose(maps.psi(k)[0, head].numpy(), oracle, rtol=1e-12, atol=1e-12)


def test_exponents_are_limited():
    tensors = {name: tensor * 100 for name, tensor in tensors_of("exp").items()}
    maps = lc.FeatureMaps.from_tensors([tensors])[0]
    for features in (maps.phi(torch.randn(1, 4, 9, 4)), maps.psi(torch.randn(1, 2, 9, 4))):
        assert features.isfinite().all()
        assert features.max() <= np.exp(30) * 1.001
        assert features.min() >= np.exp(-30) * 0.999


def test_the_last_layers_stay_wide_when_the_matrices_narrow():
    maps = lc.FeatureMaps.from_tensors([tensors_of()]).to(dtype=torch.bfloat16)
    assert maps[0].tensors["phi_w1"].dtype == torch.bfloat16
    assert maps[0].tensors["psi_w3"].dtype == maps[0].tensors["psi_s1"].dtype == torch.float32
    assert maps[0].phi(torch.randn(1, 4, 2, 4).bfloat16()).dtype == torch.float32
    assert maps.to("meta")[0].tensors["phi_w1"].device.type == "meta"
