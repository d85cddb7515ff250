"""`LessCache` by itself: rows, reset, snapshots, and what it cannot do."""

from pathlib import Path

import pytest
import torch

import less_cache as lc
from less_cache._tensor_files import read_tensors, write_tensors
from less_cache.integrations.transformers import saving
from tests.integrations.models import build, full, less, model_of, prompts

GREEDY = {"do_sample": False, "eos_token_id": None}
FAMILIES = ["llama", "gemma2", "falcon_mqa"]


@torch.no_grad()
def filled(model, handle, rows=3, length=9):
    cache = handle.new_cache()
    ids, _ = prompts([length] * rows)
    model(ids, past_key_values=cache)
    return cache, ids


@torch.no_grad()
def continued(model, cache, rows):
    ids, _ = prompts([2] * 8, seed=7)
    return model(ids[rows], past_key_values=cache).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_can_be_moved_and_copied(family):
    model = model_of(family)
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        expected = continued(model, filled(model, handle)[0], [0, 1, 2])
        # Each row goes on with its own tokens, wherever it went.
        for change, rows in [
            (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        ]:
            cache, _ = filled(model, handle)
            change(cache)
            assert cache.batch_size == len(rows)
            assert cache.get_seq_length() == 9
            found = continued(model, cache, rows)
            torch.testing.assert_close(found, expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_is_a_fresh_cache(family):
    model = model_of(family)
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache, ids = filled(model, handle)
        state = cache.state
        cache.reset()
        assert cache.get_seq_length() == 0
        assert not state.length.any()
        with torch.no_grad():
            again = model(ids, past_key_values=cache).logits
            fresh = model(ids).logits
        assert cache.state is state
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_goes_on_from_a_snapshot_bit_for_bit(family, side, tmp_path):
    model = model_of(family)
    config, maps = less(model)
    # Padding in every row: the columns seen are then more than any row's tokens.
    ids, mask = prompts([10, 6], side=side)
    more = (2, 0) if side == "left" else (0, 2)
    ids, mask = (torch.nn.functional.pad(x, more) for x in (ids, mask))
    settings = {"past_key_values": None, **GREEDY}
    with lc.attach(model, config, maps) as handle:
        settings["past_key_values"] = cache = handle.new_cache()
        first = model.generate(ids, attention_mask=mask, max_new_tokens=5, **settings)
        cache.save(tmp_path / "cache")
        mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        expected = model.generate(first, attention_mask=mask, max_new_tokens=8, **settings)
    # A new attachment with maps of the same numbers, as in another process.
    other = lc.FeatureMaps.from_tensors([dict(layer.tensors) for layer in maps])
    with lc.attach(model, config, other) as handle:
        settings["past_key_values"] = again = handle.load_cache(tmp_path / "cache")
        found = model.generate(first, attention_mask=mask, max_new_tokens=8, **settings)
    assert torch.equal(found, expected)
    assert again.get_seq_length() == cache.get_seq_length()
    for mine, theirs in zip(again.state.layers, cache.state.layers, strict=True):
        for name, array in mine.arrays().items():
            assert torch.equal(array, getattr(theirs, name)), name


def test_snapshots_that_do_not_fit(tmp_path):
    model = model_of("gemma2")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        with pytest.raises(ValueError, match="no tokens yet"):
            handle.new_cache().save(tmp_path / "empty")
        assert not (tmp_path / "empty").exists()
        cache, _ = filled(model, handle)
        cache.save(tmp_path / "one")
        continued(model, cache, [0, 1, 2])
        cache.save(tmp_path / "two")
        with pytest.raises(FileNotFoundError):
            handle.load_cache(tmp_path / "none")
    mixed = tmp_path / "one" / "state.safetensors"
    mixed.write_bytes((tmp_path / "two" / "state.safetensors").read_bytes())
    with lc.attach(model, config, maps) as handle:
        with pytest.raises(FileNotFoundError, match="belongs to"):
            handle.load_cache(tmp_path / "one")
        (layers,) = (tmp_path / "two").glob("layers.*")
        layers.write_bytes(layers.read_bytes()[:-7])
        with pytest.raises(ValueError, match="truncated"):
            handle.load_cache(tmp_path / "two")
    with (
        lc.attach(model, config.replace(capacity=7), maps) as handle,
        pytest.raises(ValueError, match="another config"),
    ):
        handle.load_cache(tmp_path / "two")


@pytest.mark.parametrize(
    ("header", "cut", "message"),
    [
        ({}, True, r"0\.keys: shape .*, expected \[3, 2, tokens, 16\]"),
        ({"seen": '["9", 9, 9, 9]'}, False, "seen: unexpected"),
        ({"seen": "[" * 100_000}, False, "nested too deeply"),
    ],
)
def test_what_does_not_belong_beside_a_snapshot(tmp_path, header, cut, message):
    model = model_of("gemma2")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        filled(model, handle)[0].save(tmp_path)
        (path,) = tmp_path.glob("layers.*")
        old, tensors = read_tensors(path)
        del old["sha256"]
        if cut:
            tensors["0.keys"] = tensors["0.keys"][..., 1:]
        write_tensors(path, tensors, {**old, **header})
        with pytest.raises(ValueError, match=message):
            handle.load_cache(tmp_path)


@pytest.mark.parametrize("step", ["layers", "state"])
def test_a_save_that_broke_off_leaves_the_old_one(tmp_path, monkeypatch, step):
    model = model_of("gemma2")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache, _ = filled(model, handle)
        cache.save(tmp_path)
        continued(model, cache, [0, 1, 2])

        def broken(*given):
            raise OSError("disk full")

        if step == "layers":
            monkeypatch.setattr(saving, "write_tensors", broken)
        else:
            monkeypatch.setattr(Path, "replace", killed_at_the_last_rename(Path.replace))
        with pytest.raises(OSError, match="disk full"):
            cache.save(tmp_path)
        monkeypatch.undo()
        assert handle.load_cache(tmp_path).get_seq_length() == 9
        cache.save(tmp_path)
        assert handle.load_cache(tmp_path).get_seq_length() == 11
        assert len(list(tmp_path.iterdir())) == 2


def killed_at_the_last_rename(replace):
    def broken(self, target):
        # Both files are there by then; only the snapshot has not got its name yet.
        if target.name == saving.STATE_FILE:
            raise OSError("disk full")
        return replace(self, target)

    return broken


def test_no_rollback():
    model = model_of("llama")
    with lc.attach(model, full(model)) as handle:
        cache, _ = filled(model, handle)
        with pytest.raises(NotImplementedError, match="crop: not supported"):
            cache.crop(-1)
        with pytest.raises(NotImplementedError, match="activate_past_recording"):
            cache.activate_past_recording()
        assert not cache.is_croppable
        assert cache.get_seq_length() == 9


def test_bytes_dtype_and_device_are_the_models():
    model = build("llama").to(torch.bfloat16)
    config, maps = less(model, capacity=10)
    with lc.attach(model, config, maps) as handle:
        cache = handle.new_cache(batch_size=2)
        assert cache.nbytes == 0
        assert cache.state is None
        model.generate(prompts([5, 5])[0], past_key_values=cache, max_new_tokens=9)
    assert cache.state.layers[0].keys.dtype == torch.bfloat16
    assert cache.state.layers[0].H.dtype == torch.float32
    assert cache.nbytes == cache.state.nbytes == 2 * config.bytes_per_sequence("bfloat16")


def test_sliding_layers_count_in_bytes_and_stay_bounded():
    model = model_of("gemma2")
    config, maps = less(model)
    with lc.attach(model, config, maps) as handle:
        cache, _ = filled(model, handle, rows=1)
        sliding = cache.nbytes - cache.state.nbytes
        # Two layers keep the last 4 keys and values of 2 heads of 16 floats.
        assert sliding == 2 * 2 * 4 * 2 * 16 * 4
        continued(model, cache, [0])
        assert cache.nbytes - cache.state.nbytes == sliding


def test_a_pass_that_broke_off():
    model = model_of("llama")
    with lc.attach(model, full(model)) as handle:
        cache, ids = filled(model, handle)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            continued(model, cache, [0, 1, 2])
        hook.remove()
        with pytest.raises(ValueError, match="broke off between layers"):
            continued(model, cache, [0, 1, 2])
        cache.reset()
        with torch.no_grad():
            again = model(ids, past_key_values=cache).logits
            assert torch.equal(again, model(ids).logits)


def test_wrong_batch_sizes():
    model = model_of("llama")
    with lc.attach(model, full(model)) as handle:
        for size, error in [(0, ValueError), (2.0, TypeError)]:
            with pytest.raises(error, match="batch_size"):
                handle.new_cache(batch_size=size)
        cache, _ = filled(model, handle, rows=2)
        with pytest.raises(ValueError, match="holds 2 sequences, but the input has 3"):
            continued(model, cache, [0, 1, 2])
        assert cache.get_seq_length() == 9
