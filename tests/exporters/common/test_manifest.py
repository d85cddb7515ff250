"""Manifests that are damaged, or lead out of their folder, are refused by path and field."""

import json

import pytest

import less_cache as lc
from exporters.common.folders import listed
from exporters.common.manifest import FORMAT, MANIFEST, MODEL, WEIGHTS, read_manifest

CONFIG = lc.CacheConfig(
    num_layers=1, query_heads=2, kv_heads=2, head_dim=4, capacity=6, policy=lc.TOVA(), rank=0
)

RUN = {"heads": [0, 1], "capacity": 6, "arrays": []}


@pytest.fixture
def folder(tmp_path):
    """A folder that passes: the model's file may hold anything here."""
    out = tmp_path / "exported"
    out.mkdir()
    for name in (MODEL, WEIGHTS):
        (out / name).write_bytes(name.encode())
    data = {
        "format": FORMAT,
        "config": CONFIG.to_dict(),
        "maps_digest": None,
        "vocab_size": 11,
        "eos_token_ids": [2],
        "bytes_per_sequence": 4,
        "all_logits": False,
        "inputs": ["input_ids", "attention_mask", "past.length"],
        "outputs": ["logits", "present.length"],
        "state": [{"name": "length", "dtype": "int32", "shape": []}],
        "layers": [{"window": 0, "maps": None, "runs": [RUN]}],
        "files": listed(out),
    }
    (out / MANIFEST).write_text(json.dumps(data))
    return out


def edit(folder, change):
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_a_manifest_is_read(folder):
    manifest = read_manifest(folder)
    assert manifest.config == CONFIG
    assert manifest.vocab_size == 11
    assert manifest.eos_token_ids == (2,)


def move_model(data):
    data["files"][f"../other/{MODEL}"] = data["files"].pop(MODEL)


FIELDS = ("config", "maps_digest", "vocab_size", "eos_token_ids", "bytes_per_sequence")
FIELDS += ("all_logits", "inputs", "outputs", "state", "layers", "files")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_named(folder, field):
    edit(folder, lambda data: data.pop(field))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: lacks \['{field}'\]"):
        read_manifest(folder)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_form_is_named(folder, field):
    edit(folder, lambda data: data.update({field: 1.5}))
    with pytest.raises(ValueError, match=rf"{MANIFEST}: {field}: got 1.5, expected"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_model, rf"files: got '../other/{MODEL}', expected files inside the folder"),
        (lambda d: d["files"].update({"/etc/hosts": {}}), "files: got '/etc/hosts'"),
        (lambda d: d["files"].update({"a\\b": {}}), "expected files inside the folder"),
        (lambda d: d["files"].pop(MODEL), rf"files: lacks \['{MODEL}'\]"),
        (lambda d: d["files"].pop(WEIGHTS), rf"files: lacks \['{WEIGHTS}'\]"),
        (lambda d: d["files"][MODEL].pop("sha256"), rf"files\['{MODEL}'\]: lacks \['sha256'\]"),
        (lambda d: d["files"].update({MODEL: None}), "got None, expected an object"),
        (lambda d: d.update(vocab_size=True), "vocab_size: got True, expected an integer"),
        (lambda d: d.update(vocab_size=0), "vocab_size: got 0, expected an integer 1 to"),
        (
            lambda d: d.update(eos_token_ids=[-1]),
            r"eos_token_ids\[0\]: got -1, expected an integer",
        ),
        (lambda d: d["state"][0].update(shape=[0]), r"shape\[0\]: got 0, expected an integer 1"),
        (lambda d: d["state"][0].update(dtype="x"), r"state\[0\]: dtype: got 'x', expected one of"),
        (lambda d: d["state"][0].update(shape=["a"]), r"state\[0\]: shape\[0\]: got 'a', expected"),
        (lambda d: d["state"][0].update(name="x"), r"inputs: lacks \['past.x'\], which state"),
        (lambda d: d["layers"][0].update(runs=[]), r"layers\[0\]: no runs of heads"),
        (lambda d: d["layers"][0].update(runs=[{}]), r"layers\[0\]: runs\[0\]: lacks \['heads'"),
        (
            lambda d: d["layers"][0]["runs"][0].update(arrays=["0.keys"]),
            r"state: lacks \['0.keys'\], which layers name",
        ),
        (lambda d: d["layers"].append(d["layers"][0]), "layers: 2 without a window, but config"),
        (lambda d: d["config"].pop("rank"), r"config: .*missing field\(s\) \['rank'\]"),
        (lambda d: d["config"].update(policy=[7]), "config: "),
        (lambda d: d.update(format=["x"]), "format: got"),
    ],
)
def test_what_does_not_fit_is_refused_by_path_and_field(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=f"{MANIFEST}.*{message}"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": ' + "[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "format: got"),
    ],
)
def test_json_that_is_none_is_refused(folder, text, message):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"{MANIFEST}: .*{message}"):
        read_manifest(folder)


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(folder)
