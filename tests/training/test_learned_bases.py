"""Bases that are learned begin where they are told, and end as bases of a file."""

from __future__ import annotations

import pytest
import torch

from less_cache import Quantization
from less_cache.quantization.transforms import Transforms
from less_cache.teacher_forced import stored_pairs
from less_cache.training import calibrate
from less_cache.training.learned_bases import LearnedBases


@pytest.fixture
def layer(model, tokens, config):
    config = config.replace(quantization=Quantization(3, 2, "calibrated"))
    return config.layer(0), calibrate(model, config, tokens, progress=False)[0]


def pairs(spec, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, spec.kv_heads, 9, spec.head_dim, generator=draw)


def test_they_begin_as_given(layer):
    spec, basis = layer
    learned = LearnedBases(basis, "cpu")
    for found, wanted in zip(
        learned.stored_pairs(spec, *pairs(spec)),
        stored_pairs(spec, *pairs(spec), basis),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    finished = learned.finished(learned.parameters)
    for name, tensor in finished.named().items():
        torch.testing.assert_close(tensor, getattr(basis, name), rtol=1e-6, atol=1e-9)


def test_what_is_finished_is_what_was_learned(layer):
    spec, basis = layer
    learned = LearnedBases(basis, "cpu")
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in learned.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    finished = learned.finished(learned.parameters)
    # All but a few numbers at levels' edges, which bases of 16 bits move across them.
    for found, wanted in zip(
        learned.stored_pairs(spec, *pairs(spec)),
        stored_pairs(spec, *pairs(spec), finished),
        strict=True,
    ):
        near = torch.isclose(found, wanted, rtol=1e-2, atol=2e-2)
        assert near.float().mean() > 0.97
    again = Transforms.from_parts("here", *Transforms("calibrated", [finished]).to_parts())[0]
    for name, tensor in finished.named().items():
        assert torch.equal(tensor, getattr(again, name))


def test_every_parameter_has_a_slope(layer):
    spec, basis = layer
    learned = LearnedBases(basis, "cpu")
    k, v = learned.stored_pairs(spec, *pairs(spec))
    (k.square().sum() + v.square().sum()).backward()
    for parameter in learned.parameters.values():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0
