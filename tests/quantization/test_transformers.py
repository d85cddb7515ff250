"""Attached models with coded pairs."""

import copy

import pytest
import torch

import less_cache as lc

pytest.importorskip("transformers")

from less_cache.training.calibrate import calibrate
from tests.integrations.models import build

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def ids(tokens, seed=0):
    return torch.randint(3, 97, (2, tokens), generator=torch.Generator().manual_seed(seed))


def coded(model, kind, dtype="float32"):
    config = lc.CacheConfig.from_model(
        model.config,
        capacity=8,
        policy=lc.H2O(),
        rank=0,
        quantization=lc.Quantization(4, 4, kind),
        dtype=dtype,
    )
    transforms = None
    if kind == "calibrated":
        transforms = calibrate(model, config, ids(40, seed=5), progress=False)
    return config, transforms


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "falcon_new"])
def test_decoding_and_scoring_agree(family, kind):
    # In float64 no number lies so close to a level's edge that the order of sums decides.
    model = build(family).double()
    config, transforms = coded(model, kind, "float64")
    tokens = ids(20)
    with torch.no_grad():
        with lc.attach(model, config, transforms=transforms) as handle:
            cache = handle.new_cache()
            steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
        with lc.attach(model, config, transforms=transforms, scoring=True):
            scored = model(tokens).logits
    torch.testing.assert_close(scored, torch.cat(steps, 1), **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "falcon_new"])
def test_layers_may_differ_in_rank_and_bits(family, tmp_path):
    # In float64 no number lies so close to a level's edge that the order of sums decides.
    model = build(family, num_hidden_layers=3).double()
    config, _ = coded(model, "hadamard", "float64")
    three, four = lc.Quantization(3, 3, "calibrated"), lc.Quantization(4, 4, "calibrated")
    config = config.replace(rank=[2, 0, 3], quantization=[None, three, four])
    transforms = calibrate(model, config, ids(40, seed=5), progress=False)
    uniform = [
        calibrate(model, config.replace(quantization=bits), ids(40, seed=5), progress=False)
        for bits in (three, four)
    ]
    assert transforms[0] is None
    assert (transforms.key_bits, transforms.value_bits) == ((0, 3, 4),) * 2
    for layer, whole in enumerate(uniform, 1):
        for name, tensor in whole[layer].named().items():
            assert torch.equal(tensor, transforms[layer].named()[name])
    maps = lc.FeatureMaps.initialise(config, hidden=8).to(dtype=torch.float64)
    tokens = ids(20)
    with torch.no_grad():
        with lc.attach(model, config, maps, transforms=transforms) as handle:
            cache = handle.new_cache()
            steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
            cache.save(tmp_path / "cache")
            read = handle.load_cache(tmp_path / "cache")
            ended = [
                model(tokens[:, :1], past_key_values=used).logits
                for used in (copy.deepcopy(cache), read, cache)
            ]
            beams = model.generate(tokens, max_new_tokens=6, num_beams=2, do_sample=False)
        with lc.attach(model, config, maps, transforms=transforms, scoring=True):
            scored = model(tokens).logits
    assert torch.equal(ended[0], ended[2])
    assert torch.equal(ended[1], ended[2])
    assert beams.shape[1] > 20
    torch.testing.assert_close(scored, torch.cat(steps, 1), **TOLERANCE)


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_caches_are_copied_and_saved_with_their_codes(tmp_path, kind):
    model = build("llama")
    config, transforms = coded(model, kind)
    with lc.attach(model, config, transforms=transforms) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids(12), past_key_values=cache, logits_to_keep=1)
        copied = copy.deepcopy(cache)
        cache.save(tmp_path / "cache")
        read = handle.load_cache(tmp_path / "cache")
        wanted = model(ids(1, seed=2), past_key_values=cache).logits
        for other in (copied, read):
            found = model(ids(1, seed=2), past_key_values=other).logits
            assert torch.equal(found, wanted)
        generated = model.generate(ids(12), max_new_tokens=6, num_beams=2, do_sample=False)
        assert generated.shape[1] <= 18


def test_eight_bits_are_nearly_what_sixteen_are():
    model = build("llama")
    plain = lc.CacheConfig.from_model(model.config, capacity=32, policy=lc.FullCache(), rank=0)
    found = []
    for config in (plain, plain.replace(quantization=lc.Quantization(8, 8))):
        with lc.attach(model, config, scoring=True), torch.no_grad():
            found.append(model(ids(20)).logits.log_softmax(2))
    assert (found[0] - found[1]).abs().max() < 0.02


def test_calibration_needs_a_config_that_asks_for_it():
    model = build("llama")
    config = lc.CacheConfig.from_model(model.config, capacity=8, policy=lc.H2O(), rank=0)
    for bits in (None, lc.Quantization(4, 4)):
        with pytest.raises(ValueError, match=r"^config: quantization is"):
            calibrate(model, config.replace(quantization=bits), ids(20))
