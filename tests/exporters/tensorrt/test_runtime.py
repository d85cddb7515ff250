"""`TensorRTDecoder` over the fake: all but TensorRT and CUDA, against `OnnxDecoder`."""

import numpy as np
import pytest
import torch

import less_cache as lc
from exporters.common.sampling import Sampler
from exporters.onnx import export_decoder
from tests.exporters.tensorrt.conftest import STREAM, C, CpuDevice
from tests.integrations.models import build, prompts


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_whole_conversations_are_onnx_runtimes(engines, standard, onnx_side, plugin, cuda_graph):
    from exporters.tensorrt import TensorRTDecoder

    decoder = TensorRTDecoder(engines if plugin else standard, cuda_graph=cuda_graph)
    for lengths in ([1], [5 * C, 1, C + 1]):
        ids, mask = (x.numpy() for x in prompts(lengths))
        states = [side.new_state(len(lengths)) for side in (decoder, onnx_side)]
        for _turn in range(2):
            found, expected = (
                side.generate(ids, mask, max_new_tokens=12, state=state, stop_tokens=[])
                for side, state in zip((decoder, onnx_side), states, strict=True)
            )
            np.testing.assert_array_equal(found, expected)
            ids = np.concatenate([found[:, -1:], ids[:, ::-1]], axis=1)
            mask = np.concatenate([mask[:, -1:], mask[:, ::-1]], axis=1)
            ids, mask = np.where(mask, ids, 0), mask.copy()
        for name, array in states[1].numpy().items():
            np.testing.assert_allclose(
                states[0].numpy()[name], array, rtol=1e-4, atol=1e-3, err_msg=name
            )
    # One graph for each batch size, however many turns and states.
    assert CpuDevice.captured == (2 if cuda_graph else 0)


def test_logits_are_onnx_runtimes(decoder, onnx_side):
    states = [side.new_state(2) for side in (decoder, onnx_side)]
    for tokens in (C + 3, 1, 1, 4, 1):
        ids = np.arange(2 * tokens).reshape(2, tokens) + 5
        mask = np.ones_like(ids)
        mask[1, 0] = tokens % 2
        found, expected = (
            side.append(state, ids, mask)
            for side, state in zip((decoder, onnx_side), states, strict=True)
        )
        assert found.shape == (2, 97)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
        np.testing.assert_array_equal(states[0].lengths(), states[1].lengths())


@pytest.mark.parametrize("plugged", [False, True])
def test_codes_are_onnx_runtimes(coded, library, tmp_path, plugged):
    from exporters.tensorrt import TensorRTDecoder, build_engines

    parts, plugin = coded("calibrated"), library if plugged else None
    out = tmp_path / "out"
    built = build_engines(parts.folder, out, max_batch=2, plugin=plugin, progress=False)
    decoder, onnx_side = TensorRTDecoder(built), parts.decoder
    states = [side.new_state(2) for side in (decoder, onnx_side)]
    assert states[0].arrays["0.h0.keys"].dtype == torch.uint8
    assert states[0].nbytes == states[1].nbytes
    for tokens in (C + 5, 1, 1, 4, 1):
        ids = np.arange(2 * tokens).reshape(2, tokens) + 5
        found, expected = (
            side.append(state, ids)
            for side, state in zip((decoder, onnx_side), states, strict=True)
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)
    states[0].save(tmp_path / "snapshot")
    read = onnx_side.load_state(tmp_path / "snapshot")
    for name, array in read.numpy().items():
        np.testing.assert_array_equal(array, states[0].numpy()[name], err_msg=name)


def test_sampling_and_stops_are_the_same_everywhere(decoder, onnx_side):
    ids, mask = (x.numpy() for x in prompts([9, 4]))
    results = [
        side.generate(
            ids,
            mask,
            max_new_tokens=10,
            sampler=Sampler(temperature=0.9, top_k=20, seed=1),
            stop_tokens=[7, 11],
            pad_token=96,
        )
        for side in (decoder, onnx_side)
    ]
    np.testing.assert_array_equal(*results)


def test_states_of_one_size_take_turns(decoder):
    ids = np.array([[5, 6, 7, 8]])
    alone = decoder.new_state(1)
    expected = [decoder.append(alone, ids)]
    expected += [decoder.append(alone, np.array([[9 + i]])) for i in range(4)]
    first, second = decoder.new_state(1), decoder.new_state(1)
    decoder.append(second, ids[:, ::-1])
    found = [decoder.append(first, ids)]
    for i in range(4):
        decoder.append(second, np.array([[30 + i]]))
        found.append(decoder.append(first, np.array([[9 + i]])))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert alone.lengths() == first.lengths() == second.lengths() == [8]


def test_a_state_that_nobody_holds_is_not_kept(decoder):
    state = decoder.new_state(1)
    decoder.append(state, np.array([[5, 6]]))
    before = state.numpy()
    copied = state.select([0])
    del state
    other = decoder.new_state(1)
    decoder.append(other, np.array([[7, 8, 9]]))
    for name, array in copied.numpy().items():
        np.testing.assert_array_equal(array, before[name])


def test_rows_are_selected_and_put_together(decoder):
    from exporters.tensorrt import TensorRTState

    ids, mask = (x.numpy() for x in prompts([9, 4, 7]))
    state = decoder.new_state(3)
    decoder.append(state, ids, mask)
    mixed = TensorRTState.concat([state.select([2]), state.select([0, 0])])
    np.testing.assert_array_equal(mixed.lengths(), [7, 9, 9])
    tokens = np.array([[5], [6], [6]])
    together = decoder.append(mixed, tokens)
    alone = decoder.append(state.select([2]), tokens[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)
    np.testing.assert_array_equal(together[1], together[2])
    for rows, error in (([3], ValueError), ([], ValueError), ([0.5], TypeError)):
        with pytest.raises(error, match="rows"):
            state.select(rows)
    with pytest.raises(ValueError, match="states: got none"):
        TensorRTState.concat([])


def test_snapshots_go_to_and_fro(parts, decoder, onnx_side, tmp_path):
    _, config, maps = parts
    state = decoder.new_state(2)
    decoder.append(state, np.arange(22).reshape(2, 11) + 5)
    state.save(tmp_path / "state")
    theirs = onnx_side.load_state(tmp_path / "state")
    torchs = lc.CacheState.load(tmp_path / "state", config, maps)
    assert torchs.length.tolist() == theirs.lengths().tolist() == [11, 11]
    theirs.save(tmp_path / "again")
    back = decoder.load_state(tmp_path / "again")
    token = np.array([[3], [4]])
    expected = decoder.append(state, token)
    np.testing.assert_allclose(decoder.append(back, token), expected, atol=1e-6)
    np.testing.assert_allclose(onnx_side.append(theirs, token), expected, atol=1e-5)


def test_the_state_is_bound_in_place_on_one_stream(trt, decoder):
    state = decoder.new_state(1)
    trt.calls.clear()
    for _ in range(4):
        decoder.append(state, np.array([[5]]))
    bound = {
        c.arguments["name"]: c.arguments["memory"]
        for c in trt.calls
        if c.method == "set_tensor_address"
    }
    pasts = [name for name in bound if name.startswith("past.")]
    assert len(pasts) == 7
    for name in pasts:
        same = bound[name] == bound[name.replace("past.", "present.")]
        assert same == (name != "past.length")
    # Addresses are given once; then steps are all there is.
    last = [c for c in trt.calls if c.owner == "IExecutionContext"][-4:]
    assert [c.method for c in last] == ["execute_async_v3"] * 4
    assert {c.arguments["stream_handle"] for c in last} == {STREAM}


@pytest.mark.parametrize(
    ("batch", "tokens", "message"),
    [(1, 65, "got 65 tokens at once, but the engines were built for at most 64")],
)
def test_what_does_not_fit_is_refused_and_the_state_stays(decoder, batch, tokens, message):
    state = decoder.new_state(batch)
    with pytest.raises(ValueError, match=message):
        decoder.append(state, np.ones((batch, tokens), np.int64))
    assert state.lengths() == [0]
    with pytest.raises(ValueError, match="batch_size: got 4, but the engines were built for"):
        decoder.new_state(4)
    with pytest.raises(TypeError, match="expected TensorRTState"):
        decoder.append(object(), np.ones((1, 1), np.int64))


def test_a_full_cache_has_room_for_so_many(tmp_path, library):
    from exporters.tensorrt import TensorRTDecoder, build_engines

    model = build("llama", num_hidden_layers=1)
    config = lc.CacheConfig.from_model(
        model.config, capacity=12, policy=lc.FullCache(), rank=0, dtype=model.dtype
    )
    export_decoder(model, config, None, tmp_path / "onnx", all_logits=True)
    build_engines(tmp_path / "onnx", tmp_path, max_prompt=12, plugin=library, progress=False)
    decoder = TensorRTDecoder(tmp_path)
    state = decoder.new_state(1)
    assert decoder.append(state, np.arange(10)[None]).shape == (1, 10, 97)
    with pytest.raises(
        ValueError, match="13 tokens in all, but FullCache holds at most capacity = 12"
    ):
        decoder.append(state, np.ones((1, 3), np.int64))
    assert decoder.append(state, np.ones((1, 1), np.int64)).shape == (1, 1, 97)


def test_bfloat16_logits_come_as_float32():
    from exporters.tensorrt import state as module

    given = torch.tensor([1.5, 2.25], dtype=torch.bfloat16)
    assert module.to_numpy(given).dtype == np.float32
    np.testing.assert_array_equal(module.to_numpy(given), [1.5, 2.25])


def test_the_example_chats(engines, monkeypatch, capsys):
    from examples.tensorrt import run

    class Letters:
        @staticmethod
        def from_pretrained(folder):
            return Letters()

        def __call__(self, text):
            return {"input_ids": [ord(letter) % 90 + 3 for letter in text]}

        def decode(self, tokens):
            return f"<{len(tokens)}>"

    monkeypatch.setattr(run, "AutoTokenizer", Letters)
    words = ["run.py", str(engines), "--tokenizer", "x", "--prompt", "once", "--prompt", "more"]
    monkeypatch.setattr("sys.argv", [*words, "--max-new-tokens", "3"])
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("bytes of cache, at any length")
    assert [line.split("<")[0] for line in lines[1:]] == ["once", "more"]
