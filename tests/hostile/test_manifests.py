"""Manifests with any field changed: refused by path and field, or as good as the true one."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from exporters.common.folders import listed
from exporters.common.manifest import FORMAT, MANIFEST, MODEL, WEIGHTS, read_manifest
from tests.helpers import POLICIES

from .files import DAMAGES, VALUES, changed_at, places
from .rule import Refusal, files_below, outcome, refused

EXAMPLES = 60


def config(policy):
    return lc.CacheConfig(1, 2, 2, 4, capacity=[[40, 41]], policy=policy, rank=0)


def write(folder, policy=POLICIES[2]):
    """A folder that passes: the files may hold anything here. What its manifest says."""
    for name in (MODEL, WEIGHTS):
        (folder / name).write_bytes(name.encode())
    run = {"heads": [0, 1], "capacity": 40, "arrays": ["0.keys"]}
    data = {
        "format": FORMAT,
        "config": config(policy).to_dict(),
        "maps_digest": None,
        "vocab_size": 11,
        "eos_token_ids": [2],
        "bytes_per_sequence": 4,
        "all_logits": False,
        "inputs": ["input_ids", "attention_mask", "past.length", "past.0.keys"],
        "outputs": ["logits", "present.length", "present.0.keys"],
        "state": [
            {"name": "length", "dtype": "int32", "shape": []},
            {"name": "0.keys", "dtype": "float32", "shape": [2, 40, 4]},
        ],
        "layers": [{"window": 0, "maps": None, "runs": [run]}],
        "files": listed(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(data))
    return data


def check_read(folder):
    """Read by the rule; a manifest that was taken can be asked for everything."""
    found = outcome(
        lambda: read_manifest(folder), str(folder), unchanged=lambda: files_below(folder)
    )
    if not isinstance(found, Refusal):
        assert found.full_layers == [0]
        assert found.largest_capacity >= 1
        assert found.bytes_per_sequence >= 0
        assert found.vocab_size >= 1
        assert all(size >= 1 for spec in found.state for size in spec.shape)
        assert all(type(token) is int for token in found.eos_token_ids)
        assert found.maps_digest is None or isinstance(found.maps_digest, str)
    return found


ODD = (None, True, 0, -1, 1.5, 2**70, "", "x", [], {}, [3], [-3], ["a"], {"a": 1}, float("nan"))


def changed_everywhere(good):
    """Each field without, and with each oddity in its place."""
    for place in places(good):
        yield place, True, changed_at(good, place, None, remove=True)
        for odd in ODD:
            yield place, False, changed_at(good, place, odd)


def test_each_field_in_each_way(tmp_path):
    for place, removed, changed in changed_everywhere(write(tmp_path)):
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        found = check_read(tmp_path)
        if removed and len(place) == 1:
            assert isinstance(found, Refusal)
            assert repr(place[0]) in str(found.error) or place == ("format",)


@given(policy=st.sampled_from(POLICIES), values=st.lists(VALUES, min_size=2), data=st.data())
def test_several_fields_changed(policy, values, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changed = write(folder, policy)
        for value in values:
            if found := places(changed):
                place = data.draw(st.sampled_from(found))
                remove = data.draw(st.booleans())
                changed = changed_at(changed, place, value, remove=remove)
        (folder / MANIFEST).write_text(json.dumps(changed))
        check_read(folder)


@given(damage=DAMAGES, name=st.sampled_from([MANIFEST, MODEL, WEIGHTS]))
def test_damaged_bytes(damage, name):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(whole))
        found = check_read(folder)
        if name != MANIFEST and damage(whole) != whole:
            assert isinstance(found, Refusal), "taken, though a byte differs"


@pytest.mark.parametrize(
    "path", ["../model.onnx", "/etc/hosts", "a/../../x", "a\\b", "", ".", "C:x", "a\0b"]
)
@pytest.mark.parametrize("renamed", [False, True])
def test_files_elsewhere(tmp_path, path, renamed):
    good = write(tmp_path)
    entry = good["files"].pop(MODEL) if renamed else good["files"][MODEL]
    good["files"][path] = entry
    (tmp_path / MANIFEST).write_text(json.dumps(good))
    refused(lambda: read_manifest(tmp_path), str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format":' + '{"a":' * 50_000, "NaN", "1", "[]"])
def test_json_that_is_no_manifest(tmp_path, text):
    write(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    refused(lambda: read_manifest(tmp_path), str(tmp_path))
