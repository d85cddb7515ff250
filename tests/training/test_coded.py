"""Training over coded pairs: what is fitted is what decoding gives."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import less_cache as lc
from less_cache.integrations.transformers.teacher_forcing import small_cache_logits
from less_cache.provenance import bases_of
from less_cache.quantization.transforms import Transforms
from less_cache.training import (
    DistillRecipe,
    calibrate,
    distill,
    distill_cache,
    end_to_end,
    train,
)
from less_cache.training.collect import collect_layer
from less_cache.training.distillation import Distillation

KINDS = ("hadamard", "calibrated")
SHORT = DistillRecipe(steps=4, batch=2, validation=2, validate_every=2, learning_rate=3e-3)


@pytest.fixture
def text(tokens):
    """What bases are fitted to, none of it what maps are fitted to."""
    return tokens.flip(0, 1)


def coded(model, config, kind, text, bits=(3, 2), **changes):
    config = config.replace(quantization=lc.Quantization(*bits, kind), **changes)
    transforms = calibrate(model, config, text, progress=False) if kind == "calibrated" else None
    return config, transforms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [lc.H2O(), lc.SinkWindow(sinks=1)], ids=["h2o", "sinks"])
def test_a_layer_is_fitted_to_what_its_steps_give(model, tokens, config, text, kind, policy):
    config, transforms = coded(model, config, kind, text, policy=policy, capacity=[[4, 12], 8])
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    own = None if transforms is None else transforms[0]
    spec = config.layer(0)
    data = collect_layer(model, tokens, 0, spec, transforms=own, progress=False)
    manager = lc.CacheManager(config, maps, transforms=transforms)
    state = manager.init(len(tokens))
    pairs = (data.q, data.k, data.v)
    steps = [manager.attend(state, 0, *(x[:, :, i : i + 1] for x in pairs)) for i in range(48)]
    rows, chosen = torch.arange(4, 48, 3), torch.tensor([7, 0, 3])
    found = data.attend(maps[0], chosen, rows)
    wanted = torch.cat(steps, 2)[chosen][:, :, rows]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Codes make a difference that the fit must see.
    plain = dataclasses.replace(data, spec=dataclasses.replace(spec, quantization=None))
    exact = dataclasses.replace(plain, transforms=None).attend(maps[0], chosen, rows)
    assert (exact - wanted).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_distilled_loss_is_that_of_decoding(model, tokens, config, text, kind):
    # In float64 no number lies so close to a level's edge that the order of sums decides.
    model = model.double()
    config, transforms = coded(model, config, kind, text, dtype="float64")
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    run = Distillation(model, tokens, config, SHORT, maps, transforms)
    ids = tokens[:2]
    with torch.no_grad():
        found = run._loss(ids)
        wanted = model(ids, use_cache=False).logits[:, 8:].log_softmax(2)
        with lc.attach(model, config, maps, transforms=transforms) as handle:
            cache = handle.new_cache()
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(48)]
    decoded = torch.cat(steps, 1)[:, 8:].log_softmax(2)
    divergence = (wanted.exp() * (wanted - decoded)).sum(2).mean()
    assert float(found) == pytest.approx(float(divergence), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_for_coded_pairs_beat_the_policy_and_know_it(
    model, tokens, config, recipe, text, tmp_path, kind
):
    config, transforms = coded(model, config, kind, text)
    longer = dataclasses.replace(recipe, epochs=8, dropout=0.0, learning_rate=1e-2)
    made = train(
        model, tokens, config, longer, tmp_path / "a", transforms=transforms, progress=False
    )
    assert all(share < 0.95 for share in made.record["validation_error_share"])
    assert lc.CacheConfig.from_dict(made.record["config"]) == config
    digest = None if transforms is None else transforms.digest
    assert made.record.get("transforms_sha256") == digest
    fitted = distill(
        model, tokens, config, made, SHORT, tmp_path / "b", transforms=transforms, progress=False
    )
    assert fitted.record["distill"].get("transforms_sha256") == digest


def test_bases_are_fitted_with_the_maps_or_without(model, tokens, config, text, tmp_path):
    recipe = DistillRecipe(
        steps=30, batch=4, validation=4, validate_every=5, learning_rate=1e-2, bases=True
    )
    # Of random text nothing can be learned but the text itself.
    seen = torch.cat([tokens[:4], tokens[:4]])
    config, transforms = coded(model, config, "calibrated", text)
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    plain = config.replace(rank=0)
    for name, own, start in (("maps", config, maps), ("bases", plain, None)):
        given = {"maps": start, "transforms": transforms, "progress": False}
        fitted, bases = distill_cache(model, seen, own, recipe, tmp_path / name, **given)
        log = [*map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())]
        least = min(entry["validation"] for entry in log)
        assert least < 0.97 * log[0]["validation"]
        assert bases.digest != transforms.digest
        assert Transforms.load(tmp_path / name / "transforms.safetensors").digest == bases.digest
        assert (fitted is None) == (start is None)
        if fitted is not None:
            assert bases_of(fitted) == bases.digest
        # What was fitted is what decoding gives, but for bases rounded to 16 bits, of which a model
        # of random weights makes much.
        with torch.no_grad():
            ids = seen[-4:]
            full = model(ids, use_cache=False).logits.log_softmax(2)
            found = small_cache_logits(model, own, fitted, ids, transforms=bases).log_softmax(2)
        loss = (full.exp() * (full - found)).sum(2)[:, 1:].mean()
        assert float(loss) == pytest.approx(least, rel=0.1)


def test_a_killed_run_over_bases_goes_on_to_the_same_result(
    model, tokens, config, text, tmp_path, dies_after
):
    config, transforms = coded(model, config, "calibrated", text)
    recipe = dataclasses.replace(SHORT, bases=True)
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    given = {"maps": maps, "transforms": transforms, "progress": False}
    whole = distill_cache(model, tokens, config, recipe, tmp_path / "whole", **given)
    with dies_after(end_to_end, Distillation, 3):
        distill_cache(model, tokens, config, recipe, tmp_path / "killed", **given)
    again = distill_cache(model, tokens, config, recipe, tmp_path / "killed", **given)
    assert [part.digest for part in again] == [part.digest for part in whole]


def test_where_there_is_nothing_to_fit_it_says_so(model, tokens, config, text, tmp_path):
    config, transforms = coded(model, config, "calibrated", text)
    more = {"progress": False}
    with pytest.raises(ValueError, match=r"^maps: got None, but the config's rank is above 0"):
        distill_cache(model, tokens, config, SHORT, tmp_path, transforms=transforms, **more)
    plain = config.replace(rank=0)
    with pytest.raises(ValueError, match=r"^maps: got None, and recipe.bases is False"):
        distill_cache(model, tokens, plain, SHORT, tmp_path, transforms=transforms, **more)
    bases = dataclasses.replace(SHORT, bases=True)
    floats = plain.replace(quantization=None)
    with pytest.raises(ValueError, match=r"^transforms: got None, expected bases to fit"):
        distill_cache(model, tokens, floats, bases, tmp_path, **more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["train", "distill"])
def test_bases_are_asked_for_and_are_part_of_the_run(
    model, tokens, config, recipe, text, tmp_path, method
):
    config, transforms = coded(model, config, "calibrated", text)
    other = calibrate(model, config, text[:5], progress=False)

    def run(config, transforms):
        more = {"transforms": transforms, "progress": False}
        if method == "train":
            train(model, tokens, config, recipe, tmp_path, layers=[0], **more)
        else:
            maps = lc.FeatureMaps.initialise(config, hidden=8)
            distill(model, tokens, config, maps, SHORT, tmp_path, **more)

    with pytest.raises(ValueError, match=r"^transforms: got None"):
        run(config, None)
    with pytest.raises(ValueError, match=r"^transforms: given, but config.quantization is None"):
        run(config.replace(quantization=None), transforms)
    assert not list(tmp_path.iterdir())
    run(config, transforms)
    with pytest.raises(ValueError, match="settings: transforms_sha256 differs"):
        run(config, other)


def test_policies_that_look_at_keys_are_refused_when_the_config_is_made(config):
    with pytest.raises(ValueError, match=r"^quantization: .*calibrated.* cannot be had with KeyNo"):
        config.replace(policy=lc.KeyNorm(), quantization=lc.Quantization(3, 3, "calibrated"))
    config.replace(policy=lc.KeyNorm(), quantization=lc.Quantization(3, 3))


def test_a_model_that_gives_no_numbers_is_not_calibrated(model, tokens, config):
    config = config.replace(quantization=lc.Quantization(3, 3, "calibrated"))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1"):
        calibrate(model, config, tokens, progress=False)
