"""Layers whose heads differ in capacity: a node for each run of equal heads."""

import json

import numpy as np
import onnx
import pytest
import torch

import less_cache as lc
from exporters.common.manifest import MANIFEST, MODEL, read_manifest
from exporters.onnx import OnnxDecoder, OnnxState, export_decoder
from less_cache import ops
from tests.exporters.exported import TorchSide, attached, compare
from tests.helpers import assert_same_state, held_by, random_maps, small_config, torch_inputs
from tests.integrations.models import less, model_of, prompts

CAPACITY = [[7, 7, 12, 7], 9]
"""Of four KV heads: three runs in the first layer, one in the second."""


@pytest.fixture(scope="module")
def parts():
    model = model_of("llama_mha")
    return model, *less(model, capacity=CAPACITY, policy=lc.H2O())


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    return export_decoder(*parts, tmp_path_factory.mktemp("ragged"))


@pytest.fixture(scope="module")
def decoder(folder):
    return OnnxDecoder(folder, threads=1)


def test_logits_and_greedy_tokens_are_torchs(parts, decoder):
    with attached(*parts) as handle:
        for lengths in ([1], [7], [13], [40, 3, 9]):
            assert compare(decoder, TorchSide(parts[0], handle), lengths, 30) < 1e-4, lengths


def test_each_run_has_arrays_that_the_manifest_names(parts, folder, decoder):
    runs = [layer["runs"] for layer in json.loads((folder / MANIFEST).read_text())["layers"]]
    found = [[(run["heads"], run["capacity"], run["recent"]) for run in layer] for layer in runs]
    assert found == [[([0, 1], 7, 3), ([2], 12, 5), ([3], 7, 3)], [([0, 1, 2, 3], 9, 4)]]
    names = [run["arrays"][0] for layer in runs for run in layer]
    assert names == ["0.h0.keys", "0.h2.keys", "0.h3.keys", "1.keys"]
    shapes = {spec.name: spec.shape for spec in read_manifest(folder).state}
    held = [name for layer in runs for run in layer for name in run["arrays"]]
    assert [*shapes] == ["length", *held]
    assert [shapes[name][:2] for name in names] == [(2, 7), (1, 12), (1, 7), (4, 9)]
    assert decoder.manifest.bytes_per_sequence == parts[1].bytes_per_sequence() - 4


def test_equal_runs_share_their_bodies(folder):
    functions = onnx.load(folder / MODEL, load_external_data=False).functions
    # Heads 0 and 1, head 2, head 3, the second layer: four kinds, a step and a chunk each.
    assert len(functions) == 8


def test_snapshots_go_both_ways(parts, decoder, tmp_path):
    model, config, maps = parts
    ids, mask = prompts([19, 4])
    with attached(model, config, maps) as handle:
        side = TorchSide(model, handle)
        side.append(ids, mask)
        side.cache.state.save(tmp_path / "torch")
        state = decoder.load_state(tmp_path / "torch")
        token = torch.tensor([[5], [6]])
        expected = side.append(token, torch.ones_like(token))
        np.testing.assert_allclose(decoder.append(state, token.numpy()), expected, atol=1e-4)
        state.save(tmp_path / "onnx")
        read = handle.manager.load(tmp_path / "onnx")
        for found, wanted, layer in zip(
            read.layers, side.cache.state.layers, config.layers, strict=True
        ):
            got, want = held_by(found, layer), held_by(wanted, layer)
            np.testing.assert_allclose(got.keys, want.keys, atol=1e-5)
            np.testing.assert_allclose(got.values, want.values, atol=1e-5)
            want.keys, want.values = got.keys, got.values
            assert_same_state(got, want, 1e-4)


def test_rows_are_selected_and_joined(decoder):
    ids, mask = (x.numpy() for x in prompts([19, 4]))
    state = decoder.new_state(2)
    decoder.append(state, ids, mask)
    joined = OnnxState.concat([state.select([1]), state.select([0])])
    token = np.array([[5], [6]])
    swapped = decoder.append(joined, token[::-1])
    np.testing.assert_allclose(swapped[::-1], decoder.append(state, token), atol=1e-5)


def test_a_full_cache_has_the_room_of_its_smallest_head(tmp_path):
    model = model_of("llama")
    config = lc.CacheConfig.from_model(
        model.config, capacity=[[9, 6], 8], policy=lc.FullCache(), rank=0
    )
    decoder = OnnxDecoder(export_decoder(model, config, None, tmp_path), threads=1)
    state = decoder.new_state(1)
    with pytest.raises(
        ValueError, match="7 tokens in all, but FullCache holds at most capacity = 6"
    ):
        decoder.append(state, np.full((1, 7), 5))
    decoder.append(state, np.full((1, 6), 5))


@pytest.mark.parametrize("rank", [0, 6])
def test_the_operator_takes_dense_arrays_and_changes_none(rank):
    # As many rows of H as slots: shapes alone do not tell the arrays apart.
    config = small_config(num_layers=1, rank=rank)
    layer, maps = config.layer(0), random_maps(config)
    manager = lc.CacheManager(config, maps, backend="torch")
    state = manager.init(2)
    names = ops.state_names(layer)
    held = state.layers[0].of_run(layer.runs[0]).named()
    arrays = [held[name].clone() for name in names]
    kind = maps.kind if maps is not None else None
    tensors = [maps[0].tensors[name] for name in ops.map_names(kind)] if maps is not None else []
    length = torch.zeros(2, dtype=torch.int32)
    for tokens in (9, 1):
        inputs = torch_inputs(config, 2, tokens, seed=tokens)
        mask = torch.ones(2, tokens, dtype=torch.int32)
        before = [array.clone() for array in arrays]
        spec = ops.layer_spec(layer, kind)
        out, *new = ops.functional_step(*inputs, mask, length, arrays, tensors, spec)
        torch.testing.assert_close(out, manager.attend(state, 0, *inputs), rtol=0, atol=0)
        for old, array in zip(before, arrays, strict=True):
            assert torch.equal(old, array)
        for name, array in zip(names, new, strict=True):
            assert torch.equal(array, held[name]), name
        arrays, length = new, length + tokens


def test_the_operator_refuses_heads_that_differ():
    config = small_config(num_layers=1, rank=0, capacity=[[6, 8]])
    q, k, v = torch_inputs(config, 1, 1)
    mask, length = torch.ones(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"capacities \(6, 8\), expected those of one run"):
        ops.functional_step(q, k, v, mask, length, [], [], ops.layer_spec(config.layer(0), None))
