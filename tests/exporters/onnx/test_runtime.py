"""`OnnxDecoder`: states, generation, snapshots, and what it refuses."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

import less_cache as lc
from exporters.common.folders import described
from exporters.common.manifest import MANIFEST, MODEL, WEIGHTS
from exporters.onnx import OnnxDecoder, OnnxState, export_decoder
from less_cache.arrays import MAX_TOKENS
from tests.exporters.exported import TorchSide, attached
from tests.helpers import assert_same_state, held_by
from tests.integrations.models import less, model_of, prompts


@pytest.fixture(scope="module")
def parts():
    model = model_of("llama")
    return model, *less(model, capacity=8)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    return export_decoder(*parts, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def decoder(folder):
    return OnnxDecoder(folder, threads=1)


def started(decoder, lengths=(9, 4, 7)):
    ids, mask = prompts(list(lengths))
    state = decoder.new_state(len(lengths))
    return state, decoder.append(state, ids.numpy(), mask.numpy())


def test_a_state_has_the_bytes_that_the_config_says(parts, decoder):
    state = decoder.new_state(3)
    lengths = (parts[1].num_layers - 1) * 4
    assert state.nbytes == 3 * (parts[1].bytes_per_sequence() - lengths)
    assert state.nbytes == sum(x.nbytes for x in state.numpy().values())
    before = state.nbytes
    decoder.append(state, np.full((3, 50), 5))
    assert state.nbytes == before == sum(x.nbytes for x in state.numpy().values())


def test_rows_are_independent(decoder):
    state, _ = started(decoder)
    mixed = OnnxState.concat([state.select([2]), state.select([0, 0])])
    assert mixed.batch_size == 3
    tokens = np.array([[5], [6], [6]])
    together = decoder.append(mixed, tokens)
    alone = decoder.append(state.select([2]), tokens[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)
    np.testing.assert_allclose(together[1], together[2], atol=1e-6)
    # What was selected from is untouched by what became of the selection.
    np.testing.assert_array_equal(state.lengths(), [9, 4, 7])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([3], ValueError, "rows 3 to 3, expected 0 to 2"),
        ([-1], ValueError, "rows -1 to -1"),
        ([], ValueError, "not empty"),
        ([0.5], TypeError, "expected integers"),
    ],
)
def test_select_refuses(decoder, rows, error, message):
    with pytest.raises(error, match=message):
        decoder.new_state(3).select(rows)


def test_concat_refuses_nothing(decoder):
    with pytest.raises(ValueError, match="states: got none"):
        OnnxState.concat([])


def test_snapshots_go_both_ways(parts, decoder, tmp_path):
    model, config, maps = parts
    ids, mask = prompts([9, 4])
    with attached(model, config, maps) as handle:
        side = TorchSide(model, handle)
        side.append(ids, mask)
        side.cache.state.save(tmp_path / "torch")
        state = decoder.load_state(tmp_path / "torch")
        np.testing.assert_array_equal(state.lengths(), [9, 4])
        token = torch.tensor([[5], [6]])
        expected = side.append(token, torch.ones_like(token))
        np.testing.assert_allclose(decoder.append(state, token.numpy()), expected, atol=1e-4)
        state.save(tmp_path / "onnx")
        read = handle.manager.load(tmp_path / "onnx")
        layers = zip(read.layers, side.cache.state.layers, config.layers, strict=True)
        for found, wanted, layer in layers:
            got, want = held_by(found, layer), held_by(wanted, layer)
            want.keys, want.values = got.keys, got.values
            assert_same_state(got, want, 1e-4)


def test_snapshots_of_others_are_refused(parts, decoder, tmp_path):
    _, config, maps = parts
    other = lc.CacheManager(config.replace(capacity=9), maps)
    other.init(1).save(tmp_path / "other")
    with pytest.raises(ValueError, match="made with another config: capacity"):
        decoder.load_state(tmp_path / "other")
    strange = lc.FeatureMaps.initialise(config, hidden=5)
    lc.CacheManager(config, strange).init(1).save(tmp_path / "maps")
    with pytest.raises(ValueError, match="other feature maps"):
        decoder.load_state(tmp_path / "maps")


def test_generation_in_two_turns_is_generation_of_the_whole(decoder):
    ids, mask = prompts([9, 4])
    stop = {"stop_tokens": []}
    whole = decoder.generate(ids.numpy(), mask.numpy(), max_new_tokens=20, **stop)
    state = decoder.new_state(2)
    first = decoder.generate(ids.numpy(), mask.numpy(), max_new_tokens=8, state=state, **stop)
    second = decoder.generate(first[:, -1:], max_new_tokens=12, state=state, **stop)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)


def test_sequences_end_at_their_stop_token(decoder):
    ids, mask = prompts([9, 4])
    free = decoder.generate(ids.numpy(), mask.numpy(), max_new_tokens=12, stop_tokens=[])
    stop = int(free[0, 2])
    state = decoder.new_state(2)
    found = decoder.generate(
        ids.numpy(), mask.numpy(), max_new_tokens=12, state=state, stop_tokens=[stop], pad_token=77
    )
    first = int(np.argmax(free[0] == stop))
    np.testing.assert_array_equal(found[0, : first + 1], free[0, : first + 1])
    assert (found[0, first + 1 :] == 77).all()
    # A sequence that has ended takes nothing more in.
    assert state.lengths()[0] == 9 + first


def test_streaming_gives_tokens_one_by_one(decoder):
    ids, mask = prompts([9, 4])
    arguments = {"max_new_tokens": 6, "stop_tokens": []}
    whole = decoder.generate(ids.numpy(), mask.numpy(), **arguments)
    steps = decoder.stream(ids.numpy(), mask.numpy(), **arguments)
    np.testing.assert_array_equal(next(steps).tokens, whole[:, 0])
    rest = list(steps)
    np.testing.assert_array_equal(np.stack([s.tokens for s in rest], 1), whole[:, 1:])
    assert not rest[-1].finished.any()


@pytest.mark.parametrize(
    ("ids", "mask", "error", "message"),
    [
        ([[1, 2]], None, ValueError, r"got shape \(1, 2\), expected \[2, 1 or more\]"),
        ([[1], [97]], None, ValueError, "tokens 1 to 97, expected 0 to 96"),
        ([[1], [-1]], None, ValueError, "tokens -1 to 1"),
        ([[1.0], [2.0]], None, TypeError, "expected integers"),
        ([[1], [2]], [[1, 1], [1, 1]], ValueError, "attention_mask: got shape"),
        ([[1], [2]], [[1], [2]], ValueError, "other values than 0 and 1"),
    ],
)
def test_inputs_are_refused_and_the_state_stays(decoder, ids, mask, error, message):
    state = decoder.new_state(2)
    with pytest.raises(error, match=message):
        decoder.append(state, np.array(ids), None if mask is None else np.array(mask))
    np.testing.assert_array_equal(state.lengths(), [0, 0])


def test_padding_may_hold_any_token(decoder):
    state = decoder.new_state(1)
    decoder.append(state, np.array([[-100, 5]]), np.array([[0, 1]]))
    assert state.lengths()[0] == 1


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def edit_manifest(change):
    def edit(copy):
        data = json.loads((copy / MANIFEST).read_text())
        change(data)
        (copy / MANIFEST).write_text(json.dumps(data))

    return edit


def truncate(copy):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:-100])


def spoil(copy):
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[100] ^= 1
    (copy / WEIGHTS).write_bytes(data)


def other_capacity(data):
    data["state"][1]["shape"][1] = 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (truncate, ValueError, f"{WEIGHTS}: truncated"),
        (spoil, ValueError, f"{WEIGHTS}: not the file"),
        (lambda copy: (copy / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS}: missing"),
        (lambda copy: (copy / MANIFEST).unlink(), FileNotFoundError, "no such file"),
        (lambda copy: (copy / MANIFEST).write_text("{"), ValueError, "not valid JSON"),
        (edit_manifest(lambda d: d.update(format="x")), ValueError, "format: got 'x'"),
        (edit_manifest(lambda d: d.pop("state")), ValueError, r"lacks \['state'\]"),
        (edit_manifest(other_capacity), ValueError, r"past.0.keys is .*says float32 \(2, 9, 12\)"),
        (
            edit_manifest(lambda d: d["inputs"].append("past.2.keys")),
            ValueError,
            r"lacks the inputs \['past.2.keys'\]",
        ),
        (
            edit_manifest(lambda d: d["outputs"].remove("present.0.H")),
            ValueError,
            r"has the outputs \['present.0.H'\]",
        ),
    ],
)
def test_a_damaged_folder_is_refused(folder, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        OnnxDecoder(damaged(folder, tmp_path, change), threads=1)


def test_a_graph_that_onnx_runtime_cannot_load_is_told(folder, tmp_path):
    def spoil_graph(copy):
        model = onnx.load(copy / MODEL, load_external_data=False)
        del model.functions[:]
        onnx.save(model, copy / MODEL)
        edit_manifest(lambda data: data["files"].update({MODEL: described(copy / MODEL)}))(copy)

    with pytest.raises(ValueError, match="ONNX Runtime cannot load it"):
        OnnxDecoder(damaged(folder, tmp_path, spoil_graph), threads=1)


def test_unknown_providers_are_refused(folder):
    with pytest.raises(ValueError, match="providers: got 'NoSuchProvider'"):
        OnnxDecoder(folder, providers=["NoSuchProvider"])


@pytest.mark.parametrize(
    ("policy", "most", "reason"),
    [
        (lc.SinkWindow(), MAX_TOKENS, "a sequence has at most"),
        (lc.H2O(), 2**24, "H2O.* sums in float32"),
    ],
    ids=["positions", "sums"],
)
def test_more_tokens_than_numbers_hold_are_refused(tmp_path, policy, most, reason):
    model = model_of("llama")
    config, maps = less(model, policy=policy)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path), threads=1)
    state = decoder.new_state(1)
    decoder.append(state, np.array([[3, 4, 5]]))
    arrays = state.numpy()
    far = most - 4
    arrays["length"] += far
    for name in (name for name in arrays if name.endswith(".positions")):
        arrays[name][arrays[name] >= 0] += far
    state = decoder.new_state(1)
    for name, value in state.arrays.items():
        value.update_inplace(arrays[name])
    state.tokens_bound = most - 1
    with pytest.raises(ValueError, match=f"tokens in all, but {reason}"):
        decoder.append(state, np.array([[3, 4]]))
    decoder.append(state, np.array([[3]]))
    with pytest.raises(ValueError, match=f"tokens in all, but {reason}"):
        decoder.append(state, np.array([[3]]))
