"""Exported models compute what the attached torch model does."""

import json

import numpy as np
import onnx
import pytest
import torch

import less_cache as lc
from exporters.common.manifest import MANIFEST, MODEL, WEIGHTS
from exporters.onnx import OnnxDecoder, export_decoder
from tests.exporters.exported import CAPACITY, TorchSide, attached, compare
from tests.integrations.models import build, less, model_of, prompts

C = CAPACITY
PROMPTS = ([1], [C - 1], [C], [C + 1], [5 * C], [5 * C, 1, C + 1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "falcon_new"])
def test_logits_and_greedy_tokens_are_torchs(family, tmp_path):
    model = model_of(family)
    config, maps = less(model, capacity=C)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path), threads=1)
    onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
    with attached(model, config, maps) as handle:
        for lengths in PROMPTS:
            worst = compare(decoder, TorchSide(model, handle), lengths, 6)
            assert worst < 1e-4, lengths
        assert compare(decoder, TorchSide(model, handle), [C + 1, 4, 2 * C], 64) < 1e-4


@pytest.mark.parametrize("opset", [20, 23])
def test_every_way_of_running_a_file_gives_the_same(opset, tmp_path):
    # Gemma 2 has soft-capped logits, sliding layers, and a scale of its own.
    model = model_of("gemma2")
    policies = [lc.Scissorhands(recent=2, window=5), lc.DecayedH2O(recent=2)]
    config = lc.CacheConfig.from_model(model.config, capacity=[C, C + 3], policy=policies, rank=4)
    maps = lc.FeatureMaps.initialise(config, kind="paper", hidden=8)
    export_decoder(model, config, maps, tmp_path, opset=opset)
    with attached(model, config, maps) as handle:
        for optimize in (True, False):
            for in_place in (True, False):
                decoder = OnnxDecoder(tmp_path, threads=1, optimize=optimize, in_place=in_place)
                worst = compare(decoder, TorchSide(model, handle), [2 * C, 3], 8)
                assert worst < 1e-4, (optimize, in_place)


def test_an_export_is_the_same_bytes_twice_and_tells_nothing_of_the_machine(tmp_path, traced_once):
    model = model_of("llama")
    config, maps = less(model)
    for name in ("a", "b"):
        traced_once.clear()
        export_decoder(model, config, maps, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes(), name
        assert b".py" not in first
        assert b"/home" not in first
        assert str(tmp_path).encode() not in first


def test_weights_are_stored_once(tmp_path):
    model = build("llama", tie_word_embeddings=True, vocab_size=2000)
    config, maps = less(model)
    export_decoder(model, config, maps, tmp_path)
    tensors = sum(x.tensors[n].numel() for x in maps for n in x.tensors)
    expected = 4 * (sum(p.numel() for p in set(model.parameters())) + tensors)
    size = (tmp_path / MODEL).stat().st_size + (tmp_path / WEIGHTS).stat().st_size
    assert expected < size < expected + 120_000
    with attached(model, config, maps) as handle:
        decoder = OnnxDecoder(tmp_path, threads=1)
        assert compare(decoder, TorchSide(model, handle), [9, 2], 5) < 1e-4


@pytest.mark.parametrize("form", ["full", "sparse"])
def test_without_a_low_rank_state(form, tmp_path):
    model = model_of("llama")
    policy = lc.FullCache() if form == "full" else lc.TOVA()
    config = lc.CacheConfig.from_model(
        model.config, capacity=40 if form == "full" else C, policy=policy, rank=0
    )
    decoder = OnnxDecoder(export_decoder(model, config, None, tmp_path), threads=1)
    assert not any(name.endswith((".H", ".z")) for name in decoder.new_state(1).arrays)
    with attached(model, config, None) as handle:
        assert compare(decoder, TorchSide(model, handle), [12, 7], 12) < 1e-4


def test_full_cache_without_room_refuses_and_keeps_its_state(tmp_path):
    model = model_of("llama")
    config = lc.CacheConfig.from_model(model.config, capacity=6, policy=lc.FullCache(), rank=0)
    decoder = OnnxDecoder(export_decoder(model, config, None, tmp_path), threads=1)
    state = decoder.new_state(2)
    ids, mask = prompts([6, 3])
    decoder.append(state, ids.numpy(), mask.numpy())
    before = state.numpy()
    with pytest.raises(
        ValueError, match="7 tokens in all, but FullCache holds at most capacity = 6"
    ):
        decoder.append(state, np.array([[3], [3]]))
    after = state.numpy()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # The shorter row still has room.
    decoder.append(state, np.array([[3], [3]]), np.array([[0], [1]]))


def test_all_logits(tmp_path):
    model = model_of("llama")
    config, maps = less(model, capacity=40)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path, all_logits=True))
    ids, mask = prompts([7, 4])
    found = decoder.append(decoder.new_state(2), ids.numpy(), mask.numpy())
    with torch.no_grad():
        place = (mask.cumsum(1) - 1).clamp_min(0)
        expected = model(ids, attention_mask=mask, position_ids=place).logits
    np.testing.assert_allclose(found[mask == 1], expected[mask.bool()], atol=1e-4)


def test_the_mask_may_cover_what_was_seen_before(tmp_path):
    model = model_of("llama")
    config, maps = less(model)
    decoder = OnnxDecoder(export_decoder(model, config, maps, tmp_path), threads=1)
    past = {f"past.{name}": x for name, x in decoder.new_state(1).numpy().items()}
    ids = np.array([[3, 4, 5]])
    masks = np.array([[0, 1, 1]]), np.array([[1, 1, 1, 1, 0, 1, 1]])
    runs = [
        decoder.session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
        for mask in masks
    ]
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_half_precision_on_real_text(tmp_path):
    from less_cache import reference_model

    model, tokenizer = reference_model.load(dtype=torch.float16)
    config = lc.CacheConfig.from_model(
        model.config, capacity=0.05, policy=lc.SinkWindow(), rank=8, dtype="float16"
    )
    maps = lc.FeatureMaps.initialise(config, hidden=32)
    export_decoder(model, config, maps, tmp_path, tokenizer=tokenizer)
    decoder = OnnxDecoder(tmp_path, threads=1)
    text = next(iter(reference_model.held_out_documents())).text
    ids = torch.tensor([tokenizer(text)["input_ids"][:160]])
    state = decoder.new_state(1)
    # Against the same weights in float32: what 16 bits of torch round off is not counted.
    wide = model.float()
    with attached(wide, config.with_dtype("float32"), maps) as handle:
        side = TorchSide(wide, handle)
        for part in (ids[:, :140], *ids[:, 140:].split(1, 1)):
            found = decoder.append(state, part.numpy()).astype(np.float32)
            expected = side.append(part, torch.ones_like(part))
            # Log-probabilities: a shift of all logits changes nothing.
            found, expected = (x - np.logaddexp.reduce(x, 1)[:, None] for x in (found, expected))
            top = expected > expected.max() - 10
            scale = np.abs(expected[top]).max()
            assert np.abs(found - expected)[top].max() < 5e-3 * scale
    assert (tmp_path / "tokenizer.json").is_file()
    assert json.loads((tmp_path / MANIFEST).read_text())["config"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 19}, "opset: got 19, expected an integer 20 to 23"),
        ({"dtype": "float64"}, "dtype: got 'float64', expected one of"),
        ({"maps": None}, "maps: got None, but rank = 4"),
    ],
)
def test_what_is_refused(changes, message, tmp_path):
    model = model_of("llama")
    config, maps = less(model)
    arguments = {"maps": maps, **changes}
    with pytest.raises(ValueError, match=message):
        export_decoder(model, config, out_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_policy_of_ones_own_is_refused(tmp_path):
    class Mine(lc.Policy):
        pass

    model = model_of("llama")
    config = lc.CacheConfig.from_model(model.config, capacity=6, policy=Mine(), rank=0)
    with pytest.raises(ValueError, match=r"layer 0 has .*cannot be exported"):
        export_decoder(model, config, None, tmp_path)
