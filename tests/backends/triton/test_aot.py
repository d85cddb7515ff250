"""Kernels compiled ahead of time: what is written, what it takes, and that sizes do not matter."""

import json
import re

import pytest

import less_cache as lc
from less_cache.backends.triton.aot.compile_gate import read_usage
from tests.backends.triton.compiling import run

PTX_TYPES = {"u64": "i64", "b64": "i64", "u32": "i32", "b32": "i32", "f32": "f32"}


def write_manifest(folder, config, kinds, windows=(0, 0)):
    """The part of an exported model's manifest that says what its caches are."""
    layers = [
        {"policy": policy.to_dict(), "rank": rank, "maps": kind, "window": window}
        for policy, rank, kind, window in zip(
            config.policies, [config.rank if k else 0 for k in kinds], kinds, windows, strict=False
        )
    ]
    folder.mkdir()
    text = json.dumps({"config": config.to_dict(), "layers": layers})
    (folder / "less_cache.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One H2O layer with maps and one sliding layer without, for one architecture."""
    folder = tmp_path_factory.mktemp("aot")
    policies = (lc.Scissorhands(), lc.SinkWindow())
    config = lc.CacheConfig(2, 8, 2, 128, capacity=100, policy=policies, rank=12, dtype="float16")
    export = write_manifest(folder / "export", config, ["exp", None])
    module = ["-m", "less_cache.backends.triton.aot", "--out", str(folder / "kernels")]
    result = run([*module, "--arch", "90", "--export", str(export)], folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "kernels"


@pytest.fixture(scope="module")
def records(compiled):
    return json.loads((compiled / "kernels.json").read_text())["kernels"]


@pytest.mark.timeout(300)
def test_each_kernel_is_there_as_machine_code_and_as_ptx(records):
    found = {
        (r["kernel"], r["split"], r["block_b"], r["block_r"], r["selects"], r["ptx"])
        for r in records
    }
    wanted = {
        ("select_and_map", -1, 16, 16, 1),
        ("select_and_map", -1, 32, 16, 1),
        ("select_and_map", -1, 16, 16, 0),
        ("select_and_map", -1, 32, 16, 0),
        ("select_and_map", -1, 1, -1, 1),
        ("attend", 0, 0, 16, -1),
        ("attend", 0, 0, 0, -1),
        ("attend", 1, 0, -1, -1),
        ("conclude_split", -1, 0, 16, -1),
        ("conclude_split", -1, 0, 0, -1),
    }
    assert found == {(*key, ptx) for key in wanted for ptx in (False, True)}
    assert {r["rank_multiple"] for r in records} == {1, 4}
    assert {r["arch"] for r in records if not r["ptx"]} == {90}


def test_parameters_are_those_of_the_machine_code(compiled, records):
    code = (compiled / "kernels.bin").read_bytes()
    for record in records:
        assert record["offset"] % 64 == 0
        image = code[record["offset"] : record["offset"] + record["size"]]
        if not record["ptx"]:
            assert image.startswith(b"\x7fELF")
            assert record["symbol"].encode() in image
            continue
        assert image.endswith(b"\0")
        text = image.decode().rstrip("\0")
        entry = re.search(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL)
        assert entry.group(1) == record["symbol"]
        given = [PTX_TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", entry.group(2))]
        wanted = [parameter.split(":")[1] for parameter in record["parameters"].split()]
        # A pointer is 64 bits, like any number of that size. Triton's two for scratch come last.
        numbers = ["i64" if kind == "ptr" else kind for kind in [*wanted, "ptr", "ptr"]]
        assert given == numbers
        # Of 90 and later it would run on those GPUs alone.
        assert record["arch"] == 80
        assert ".target sm_80\n" in text


def test_no_registers_are_spilled(compiled, records):
    code = (compiled / "kernels.bin").read_bytes()
    for record in records:
        if not record["ptx"]:
            image = code[record["offset"] : record["offset"] + record["size"]]
            registers, spilled = read_usage(image)
            assert 0 < registers <= 255
            assert spilled == 0, record


def test_what_a_kernel_does_not_read_it_does_not_take(records):
    for record in records:
        names = {parameter.split(":")[0] for parameter in record["parameters"].split()}
        low_rank = {"H", "z", "phi", "psi", "RANK", "phi_w1", "psi_b"} & names
        without = record["block_r"] in (0, -1)
        assert bool(low_rank) != without, record
        assert not {"psi_w3", "psi_s1"} & names, "a parameter of the other kind of maps"
        assert not {"rows", "heads"} & names, "the caller's sequences have a row each, alike"
        coded = {name for name in names if "scales" in name} | {"shift", "psi_b1"} & names
        assert not coded, "pairs are stored as they are"
        shared_slots = record["kernel"] == "attend" and record["split"]
        if record["kernel"] != "select_and_map":
            assert ("splits" in names) == (shared_slots or record["kernel"] == "conclude_split")


def test_source_paths_stay_at_home(compiled):
    code = (compiled / "kernels.bin").read_bytes()
    assert b"attend.py" not in code
    assert b"triton/language" not in code


def test_the_initialisers_say_what_the_index_says(compiled, records):
    lines = (compiled / "kernels.inc").read_text().splitlines()
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        body = line.removeprefix("{").removesuffix("},")
        values = re.findall(r'"[^"]*"|[^,\s]+', body)
        assert len(values) == len(record)
        for text, value in zip(values, record.values(), strict=True):
            if isinstance(value, bool):
                assert text == str(value).lower()
            elif isinstance(value, float):
                assert float(text.removesuffix("F")) == value
            else:
                assert text.strip('"') == str(value)


def test_caches_that_differ_in_numbers_share_their_kernels(tmp_path):
    first = lc.CacheConfig(
        1, 8, 2, 64, capacity=100, policy=lc.H2O(recent=9), rank=8, dtype="float16"
    )
    others = [
        first.replace(capacity=4096),
        first.replace(query_heads=32, kv_heads=8),
        first.replace(policy=lc.DecayedH2O(factor=0.9)),
        first.replace(policy=lc.TOVA()),
        first.replace(scale=0.3),
    ]
    script = """
import sys
from pathlib import Path
from less_cache.backends.triton.aot.layouts import layouts_of_export
print(len({layout for folder in sys.argv[1:] for layout in layouts_of_export(Path(folder))}))
"""
    folders = [
        str(write_manifest(tmp_path / str(i), config, ["exp"]))
        for i, config in enumerate([first, *others])
    ]
    result = run(["-c", script, *folders], tmp_path)
    assert result.stdout.strip() == "1", result.stdout + result.stderr


def test_no_size_is_compiled_in(tmp_path):
    script = """
from less_cache.backends.triton.aot import layouts, records
known = {"HAS_MASK", "START", "GAIN", "KIND", "HEAD_DIM", "SOFTCAP", "SPLIT", "SINGLE", "DOT"}
known |= {"KEY_CODES", "VALUE_CODES", "SELECTS"}
chosen = [*layouts.every_layout(), *layouts.coded_layouts()]
for layout in chosen:
    for wanted in records.launches(layout):
        found = records.generalised(wanted, layout)
        for name, value in found.constants.items():
            allowed = name in known or name.startswith("BLOCK_") or value in (None, 0, 1, 1.0)
            assert allowed, (wanted.kernel.__name__, layout, name, value)
print(len(layouts.every_layout()), len(layouts.coded_layouts()))
"""
    result = run(["-c", script], tmp_path)
    assert result.stdout.strip() == "1050 432", result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "got 75, expected some of 80, 86, 89, 90, 100, 120"),
        (["--export", "nowhere"], "nowhere/less_cache.json: no such file"),
        (["--layouts", "some"], "invalid choice: 'some'"),
    ],
)
def test_what_it_cannot_do_it_says(arguments, message, tmp_path):
    module = ["-m", "less_cache.backends.triton.aot", "--out", str(tmp_path / "out")]
    result = run([*module, *arguments], tmp_path)
    assert result.returncode != 0
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_is_none(tmp_path):
    (tmp_path / "less_cache.json").write_text("{}")
    script = """
from pathlib import Path
from less_cache.backends.triton.aot.layouts import layouts_of_export
import sys
layouts_of_export(Path(sys.argv[1]))
"""
    result = run(["-c", script, str(tmp_path)], tmp_path)
    assert "not the manifest of an exported model: KeyError('config')" in result.stderr


def test_a_policy_without_kernels_is_refused_by_name(tmp_path):
    config = lc.CacheConfig(1, 2, 2, 64, capacity=9, policy=lc.H2O(), rank=0, dtype="float16")
    folder = write_manifest(tmp_path / "export", config, [None])
    script = """
import dataclasses, sys
from pathlib import Path
import less_cache as lc
from less_cache.backends.triton.aot.layouts import layouts_of_export
@lc.register_policy
@dataclasses.dataclass(frozen=True)
class Mine(lc.Policy):
    pass
path = Path(sys.argv[1]) / "less_cache.json"
path.write_text(path.read_text().replace('"H2O"', '"Mine"'))
layouts_of_export(path.parent)
"""
    result = run(["-c", script, str(folder)], tmp_path)
    assert "policy: Mine(sinks=0, recent=" in result.stderr
    assert "has scores of Python code, and no kernels" in result.stderr


CODED = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from less_cache.backends.triton.aot import records
from less_cache.backends.triton.aot.compile_gate import read_usage
from less_cache.backends.triton.aot.compiling import compile_kernel
from less_cache.backends.triton.aot.layouts import layouts_of_export
coded, plain = layouts_of_export(Path(sys.argv[1]))
assert plain.codes is None
for wanted in records.launches(coded):
    parameters = records.generalised(wanted, coded)
    told = SimpleNamespace(name="", shared=0)
    record = records.record_of(wanted, parameters, coded, 90, False, told).to_dict()
    # The one with the most registers.
    if record["kernel"] == "attend" and not record["split"]:
        record["usage"] = read_usage(compile_kernel(wanted, parameters, 90).asm["cubin"])
    print(json.dumps(record))
"""


def test_kernels_over_codes_say_which_and_take_scales(tmp_path):
    codes = lc.Quantization(4, 2, "calibrated")
    policies = (lc.H2O(), lc.SinkWindow())
    config = lc.CacheConfig(
        2, 32, 2, 128, capacity=100, policy=policies, rank=8, dtype="float16", quantization=codes
    )
    # Pairs of a sliding window are stored as they are.
    folder = write_manifest(tmp_path / "export", config, ["exp", None], windows=[0, 100])
    result = run(["-c", CODED, str(folder)], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 8
    (chooses,) = (record for record in records if record["kind"] == 0)
    assert (chooses["key_bits"], chooses["key_bytes"], chooses["block_b"]) == ("", 0, 1)
    assert "key_scales" not in chooses["parameters"]
    records.remove(chooses)
    for record in records:
        selects = record["kernel"] == "select_and_map"
        assert (record["key_bits"], record["value_bits"]) == ("4", "" if selects else "2")
        assert (record["key_bytes"], record["value_bytes"]) == (64, 0 if selects else 32)
        assert record["transform"] == 1
        names = {parameter.split(":")[0] for parameter in record["parameters"].split()}
        assert {"key_scales", "key_scales_row_stride"} <= names
        assert ("value_scales" in names) != selects
        assert ("psi_b1" in names) == selects
        concludes = not selects and not (record["kernel"] == "attend" and record["split"])
        assert ("shift" in names) == concludes
        assert ("part_numerator" in names) != selects
    ((registers, spilled),) = (record["usage"] for record in records if "usage" in record)
    assert 0 < registers <= 255
    assert spilled == 0
