"""Exported models with coded pairs compute what the attached torch model does."""

import json

import numpy as np
import onnx
import pytest
import torch

import less_cache as lc
from exporters.common.heads import exported_layer
from exporters.common.manifest import MANIFEST, MODEL
from exporters.onnx import OnnxDecoder, OnnxState, export_decoder
from exporters.onnx.nodes import map_inputs
from less_cache import ops, snapshot
from less_cache.quantization.transforms import layer_transforms
from tests.exporters.exported import CODED, TorchSide, attached
from tests.helpers import random_maps, small_config, torch_inputs
from tests.integrations.models import less, model_of, prompts
from tests.quantization.fitted import fitted


def exported_bytes(config):
    """What a sequence takes where positions have 32 bits."""
    layers = [exported_layer(config, i) for i in range(config.num_layers)]
    assert sum(layer.bytes_per_sequence for layer in layers) > config.bytes_per_sequence()
    return sum(layer.bytes_per_sequence for layer in layers)


@pytest.mark.parametrize("name", [name for name in CODED if name != "by layer"])
def test_prompts_steps_and_a_second_turn_are_torchs(coded, name):
    parts = coded(name)
    with parts.attached() as handle:
        for lengths, steps in (([1], 12), ([40, 3, 9], 110)):
            side, state = TorchSide(parts.model, handle), parts.decoder.new_state(len(lengths))
            ids, mask = prompts(lengths)
            errors = []
            for step in range(steps):
                found = parts.decoder.append(state, ids.numpy(), mask.numpy()).astype(np.float32)
                expected = side.append(ids, mask)
                # What a row without tokens gives means nothing.
                rows = mask.any(1).numpy()
                errors.append(np.abs(found - expected)[rows].max(initial=0))
                width = 3 if step == steps // 2 else 1
                ids = torch.from_numpy(expected.argmax(1))[:, None].repeat(1, width)
                # Some rows take nothing in.
                mask = torch.ones_like(ids)
                if step % 5 == 4:
                    mask[-1] = 0
            # Until a number lies at a level's edge, where the order of sums decides, both are one.
            assert errors[0] < (1e-1 if parts.half else 1e-4)
            assert np.median(errors) < (5e-1 if parts.half else 5e-2), lengths
            assert max(errors) < 2, lengths


@pytest.mark.parametrize("name", ["calibrated", "by layer"])
def test_steps_from_one_state_are_torchs(coded, name, tmp_path):
    # Each step begins where torch is, so that ties at a level's edge do not add up.
    parts = coded(name)
    with parts.attached() as handle:
        side = TorchSide(parts.model, handle)
        ids, mask = prompts([19, 4])
        side.append(ids, mask)
        draw = torch.Generator().manual_seed(0)
        for step in range(20):
            side.cache.state.save(tmp_path / "torch")
            state = parts.decoder.load_state(tmp_path / "torch")
            ids = torch.randint(3, 97, (2, 3 if step % 7 == 5 else 1), generator=draw)
            expected = side.append(ids, torch.ones_like(ids))
            found = parts.decoder.append(state, ids.numpy())
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_state_is_codes_and_scales_of_the_bytes_that_the_config_says(coded):
    parts = coded("calibrated")
    state = parts.decoder.new_state(3)
    assert state.nbytes == sum(array.nbytes for array in state.numpy().values())
    # One length for all layers.
    assert state.nbytes == 3 * (exported_bytes(parts.config) - 4)
    arrays = state.numpy()
    shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    assert shapes["0.h2.keys"] == ((3, 1, 12, 5), "uint8")
    assert shapes["0.h2.values"] == ((3, 1, 12, 7), "uint8")
    assert shapes["0.h2.key_scales"] == ((3, 1, 12), "float16")
    names = [name for name in arrays if name.startswith("1.")]
    kinds = "keys values scores positions key_scales value_scales H z"
    assert names == [f"1.{kind}" for kind in kinds.split()]


def test_layers_of_other_ranks_and_bits_have_arrays_of_their_own(coded):
    parts = coded("by layer")
    arrays = parts.decoder.new_state(3).numpy()
    assert sum(x.nbytes for x in arrays.values()) == 3 * (exported_bytes(parts.config) - 2 * 4)
    kinds = {
        "0": "keys values scores positions H z",
        "1.h1": "keys values scores positions key_scales value_scales",
        "2": "keys values scores positions key_scales value_scales H z",
    }
    for run, names in kinds.items():
        held = [name for name in arrays if name.startswith(f"{run}.")]
        assert held == [f"{run}.{name}" for name in names.split()]
    assert arrays["0.keys"].dtype == np.float32
    assert arrays["2.keys"].dtype == np.uint8
    told = json.loads((parts.folder / MANIFEST).read_text())
    assert [layer["rank"] for layer in told["layers"]] == [4, 0, 3]
    assert [layer["maps"] for layer in told["layers"]] == ["exp", None, "exp"]
    assert told["config"]["rank"] == [4, 0, 3]
    assert parts.decoder.manifest.config == parts.config


@pytest.mark.parametrize("name", ["calibrated", "by layer"])
def test_snapshots_go_both_ways_to_the_same_digest(coded, name, tmp_path):
    parts = coded(name)
    with parts.attached() as handle:
        side = TorchSide(parts.model, handle)
        side.append(*prompts([19, 4]))
        side.cache.state.save(tmp_path / "torch")
        parts.decoder.load_state(tmp_path / "torch").save(tmp_path / "onnx")
        handle.manager.load(tmp_path / "onnx")
    wanted, found = (snapshot.read(tmp_path / name).digest for name in ("torch", "onnx"))
    assert found == wanted
    other = fitted(parts.config, seed=50)
    with attached(parts.model, parts.config, parts.maps, other) as handle:
        side = TorchSide(parts.model, handle)
        side.append(*prompts([19, 4]))
        side.cache.state.save(tmp_path / "other")
    with pytest.raises(ValueError, match="other transforms"):
        parts.decoder.load_state(tmp_path / "other")


def test_beams_and_buffers(coded):
    parts = coded("calibrated")
    apart = OnnxDecoder(parts.folder, threads=1, optimize=False, in_place=False)
    ids, mask = (x.numpy() for x in prompts([19, 4]))
    state = parts.decoder.new_state(2)
    parts.decoder.append(state, ids, mask)
    beams = OnnxState.concat([state.select([1, 1]), state.select([0])])
    copy = state.select([0, 1])
    copy.placement, copy.spare = apart.placement, {}
    for token in range(5, 25):
        tokens = np.array([[token], [token + 1]])
        out = parts.decoder.append(state, tokens)
        np.testing.assert_allclose(apart.append(copy, tokens), out, atol=1e-4)
        found = parts.decoder.append(beams, tokens[[1, 1, 0]])
        np.testing.assert_allclose(found, out[[1, 1, 0]], atol=1e-4)


def test_layers_share_the_rotation_and_the_manifest_tells_of_codes(coded):
    parts = coded("hadamard")
    graph = onnx.load(parts.folder / MODEL).graph
    size = parts.config.head_dim
    rotations = [x for x in graph.initializer if list(x.dims)[-2:] == [size, size]]
    assert len(rotations) <= 2
    told = json.loads((parts.folder / MANIFEST).read_text())
    assert told["transforms_digest"] is None
    assert told["config"]["quantization"] == parts.config.quantization.to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "transforms: got None, but .*calibrated"),
        (3, r"transforms: fitted for \(3, 3\) bits"),
    ],
)
def test_transforms_that_do_not_fit_are_refused(given, message, tmp_path):
    model = model_of("llama")
    config, maps = less(model)
    config = config.replace(quantization=lc.Quantization(4, 4, "calibrated"))
    transforms = None
    if given:
        transforms = fitted(config.replace(quantization=lc.Quantization(3, 3, "calibrated")))
    with pytest.raises(ValueError, match=message):
        export_decoder(model, config, maps, tmp_path / "out", transforms=transforms)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_the_operator_works_in_the_basis_of_the_codes(kind):
    quantization = lc.Quantization(3, 4, kind)
    config = small_config(num_layers=1, head_dim=16, quantization=quantization)
    layer, maps = config.layer(0), random_maps(config)
    transforms = fitted(config) if kind == "calibrated" else None
    basis = layer_transforms(layer, transforms and transforms[0]).to(dtype=torch.float32)
    folded = basis.fold(maps[0])
    tensors = [folded.tensors[name] for name in map_inputs(layer, maps.kind)]
    manager = lc.CacheManager(config, maps, backend="torch", transforms=transforms)
    state = manager.init(2)
    held = state.layers[0].of_run(layer.runs[0]).named()
    arrays = [held[name].clone() for name in ops.state_names(layer)]
    length = torch.zeros(2, dtype=torch.int32)
    spec = ops.layer_spec(layer, maps.kind)
    for tokens in (9, 1):
        inputs = torch_inputs(config, 2, tokens, seed=tokens)
        *inner, shift = basis.enter(*inputs)
        mask = torch.ones(2, tokens, dtype=torch.int32)
        out, *arrays = ops.functional_step(*inner, mask, length, arrays, tensors, spec, shift)
        expected = manager.attend(state, 0, *inputs)
        torch.testing.assert_close(basis.leave(out), expected, rtol=1e-5, atol=1e-5)
        for name, array in zip(ops.state_names(layer), arrays, strict=True):
            assert torch.equal(array, held[name]), name
        length = length + tokens
