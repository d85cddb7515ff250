"""The commands' options of coded slots: what they mean together, and what comes of them."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model
from less_cache.cli.quantized import FILE, Codes, read_codes, transforms_file
from less_cache.evaluation.comparison import BASELINE_PLUS, FULL, POLICY
from tests.quantization.fitted import fitted

runner = CliRunner()
NAMES = ("bits", "key_bits", "value_bits", "transform", "transforms")


def read(**given):
    return read_codes(*(given.get(name) for name in NAMES))


def run(*arguments):
    return runner.invoke(cli.app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(reference_model.held_out_documents()[0].text[:8000])
    return path


@pytest.fixture(scope="module")
def bases(text, tmp_path_factory):
    """A folder that `calibrate` wrote, for the shipped model."""
    folder = tmp_path_factory.mktemp("bases")
    options = ("--key-bits", 3, "--value-bits", 2, "--length", 96, "--sequences", 6)
    result = run("calibrate", "--data", text, "--out", folder, *options)
    assert result.exit_code == 0, result.output
    assert f"Transforms: {folder / FILE}" in result.output.replace("\n", "")
    return folder


@pytest.fixture
def other(tmp_path):
    """Transforms that say no bits, of a small model."""
    config = lc.CacheConfig(
        2, 4, 2, 8, capacity=9, policy=lc.H2O(), rank=0,
        quantization=lc.Quantization(3, 4, "calibrated"),
    )  # fmt: skip
    lc.Transforms("calibrated", fitted(config).layers).save(tmp_path / "any.safetensors")
    return tmp_path / "any.safetensors"


def test_what_options_mean_together(bases, other):
    assert read() == Codes()
    assert read(bits=3).quantization == lc.Quantization(3, 3, "hadamard")
    assert read(key_bits=4, value_bits=2).quantization == lc.Quantization(4, 2)
    assert read(bits=8, transform="hadamard").options == {"--bits": "8"}
    for path in (bases, bases / FILE):
        for more in ({}, {"key_bits": 3, "value_bits": 2}, {"transform": "calibrated"}):
            codes = read(transforms=path, **more)
            assert codes.quantization == lc.Quantization(3, 2, "calibrated")
            assert codes.transforms.digest == lc.Transforms.load(bases / FILE).digest
            assert codes.options == {"--transforms": str(path)}
    codes = read(bits=4, transforms=other)
    assert codes.quantization == lc.Quantization(4, 4, "calibrated")
    assert codes.options == {"--bits": "4", "--transforms": str(other)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, r"^bits: got 5, expected one of \(2, 3, 4, 8\)"),
        ({"key_bits": 1, "value_bits": 2}, "^key_bits: got 1"),
        ({"bits": 3, "key_bits": 3}, "^key_bits: got 3 beside bits = 3"),
        ({"bits": 3, "value_bits": 2}, "^value_bits: got 2 beside bits = 3"),
        ({"key_bits": 3}, "^value_bits: got None"),
        ({"value_bits": 3}, "^key_bits: got None"),
        ({"transform": "fourier"}, "^transform: got 'fourier'"),
        ({"transform": "hadamard"}, "^bits: got None"),
        ({"bits": 3, "transform": "calibrated"}, "^transforms: got None"),
        ({"transform": "hadamard", "transforms": "{bases}"}, "^transforms: got .* takes none"),
        ({"bits": 3, "transforms": "{bases}"}, r"^bits: got \(3, 3\).*fitted for \(3, 2\)"),
        ({"transforms": "{other}"}, "^bits: got None"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused_by_name(given, message, bases, other):
    paths = {"{bases}": bases, "{other}": other}
    given = {name: paths.get(value, value) for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        read(**given)


def test_bases_of_other_bits_by_layer_say_which(tmp_path):
    by_layer = [lc.Quantization(3, 4, "calibrated"), lc.Quantization(8, 4, "calibrated"), None]
    made = []
    for count in (2, 3):
        config = lc.CacheConfig(
            count, 4, 2, 8, capacity=9, policy=lc.H2O(), rank=0, quantization=by_layer[:count]
        )
        made.append(tmp_path / f"{count}.safetensors")
        fitted(config).save(made[-1])
    codes = read(transforms=made[0])
    assert codes.quantization == by_layer[:2]
    assert codes.options == {"--transforms": str(made[0])}
    with pytest.raises(ValueError, match=r"^bits: got \(3, 3\).*others by layer: \[\(3, 4\), \(8"):
        read(bits=3, transforms=made[0])
    with pytest.raises(ValueError, match=r"^transforms: .* has none for layers \[2\]"):
        read(transforms=made[1])
    told = " ".join(run("info", "--transforms", made[1]).output.split())
    assert "2 of 3 layers of 2 KV heads of 8" in told
    assert "3 in layer 0, 8 in layer 1, 0 in layer 2 of keys, 4 of values" in told


def test_missing_and_damaged_transforms_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE):
        read(transforms=tmp_path)
    (tmp_path / FILE).write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match="truncated"):
        read(transforms=tmp_path)


def test_calibrate_writes_a_file_or_into_a_folder(tmp_path, text):
    assert transforms_file(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    assert transforms_file(tmp_path / "a") == tmp_path / "a" / FILE
    assert transforms_file(tmp_path) == tmp_path / FILE
    out = tmp_path / "b" / "mine.safetensors"
    result = run("calibrate", "--data", text, "--out", out, "--length", 64, "--sequences", 2)
    assert result.exit_code == 0, result.output
    assert [path.name for path in out.parent.iterdir()] == ["mine.safetensors"]
    made = lc.Transforms.load(out)
    assert (made.kind, made.key_bits, made.value_bits, len(made)) == ("calibrated", 3, 3, 6)
    told = run("info", "--transforms", out)
    assert "6 layers of 4 KV heads of 64" in told.output
    assert "3 of keys, 3 of values" in told.output


def test_a_calibration_that_fails_leaves_no_file(tmp_path, text, monkeypatch):
    def stopped(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("less_cache.training.calibrate", stopped)
    result = run("calibrate", "--data", text, "--out", tmp_path / "o", "--length", 64)
    assert result.exit_code != 0
    assert not (tmp_path / "o").exists()


def test_train_and_eval_of_coded_slots(bases, text, tmp_path):
    common = ("--data", text, "--length", 40, "--sequences", 4, "--capacity", 32)
    small = ("--recipe", "fast", "--epochs", 1, "--hidden", 4, "--rows", 4)
    trained = run("train", *common, "--transforms", bases, *small, "--out", tmp_path / "a")
    assert trained.exit_code == 0, trained.output
    maps = lc.FeatureMaps.from_pretrained(tmp_path / "a")
    wanted = lc.Quantization(3, 2, "calibrated")
    assert lc.CacheConfig.from_dict(maps.record["config"]).quantization == wanted
    # The next command is complete.
    words = shlex.split(trained.output.strip().splitlines()[-1])
    assert words[words.index("--transforms") + 1] == str(bases)
    more = ("--length", 40, "--windows", 1, "--prompts", 1, "--new-tokens", 4)
    judged = run(*words[1:], "--data", text, *more, "--out", tmp_path / "r")
    assert judged.exit_code == 0, judged.output
    assert "warning" not in judged.output
    data = json.loads((tmp_path / "r" / "comparison.json").read_text())
    names = [FULL, POLICY, "slots of 3 and 2 bits", BASELINE_PLUS, "LESS"]
    assert [cache["name"] for cache in data["caches"]] == names
    assert data["quantization"] == wanted.to_dict()


def test_distill_hands_codes_on(bases, text, tmp_path, monkeypatch):
    config = lc.CacheConfig(6, 4, 4, 64, capacity=32, policy=lc.H2O(), rank=2)
    maps = lc.FeatureMaps.initialise(config, hidden=4)
    maps.save_pretrained(tmp_path / "maps")
    seen = []

    def distill(model, tokens, config, start, recipe, out, *, transforms):
        seen.append((config, transforms, recipe.bases))
        return lc.FeatureMaps(maps.layers, record={"validation_loss": 1.0})

    monkeypatch.setattr("less_cache.training.distill", distill)
    common = ("--data", text, "--length", 40, "--maps", tmp_path / "maps", "--out", tmp_path / "o")
    result = run("distill", *common, "--transforms", bases)
    assert result.exit_code == 0, result.output
    assert seen[0][0].quantization == lc.Quantization(3, 2, "calibrated")
    assert seen[0][1].key_bits == 3
    assert not seen[0][2]
    assert f"--transforms {bases}" in result.output.strip().splitlines()[-1]
    result = run("distill", *common, "--transforms", bases, "--bases")
    assert seen[1][2]
    # The bases that were fitted are judged, not those that they began as.
    assert f"--transforms {tmp_path / 'o'}" in result.output.strip().splitlines()[-1]
    with pytest.raises(ValueError, match=r"^bases: given, but no --transforms"):
        run("distill", *common, "--bases")


def test_coded_slots_are_judged_without_maps_and_maps_for_others_are_warned_of(
    text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    more = ("--data", text, "--length", 40, "--windows", 1, "--prompts", 0, "--capacity", 32)
    result = run("eval", "--bits", 3, *more)
    assert result.exit_code == 0, result.output
    assert "in 3 bits (hadamard)" in result.output
    data = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [cache["name"] for cache in data["caches"]] == [FULL, POLICY, "3-bit slots"]
    shipped = reference_model.__path__[0] + "/maps/h2o-5/end-to-end"
    result = run("eval", "--bits", 3, "--maps", shipped, *more)
    assert "trained for pairs stored as they are, not in 3 bits (hadamard)" in result.output


def test_eval_needs_maps_or_codes_and_bases_of_its_model(other):
    with pytest.raises(ValueError, match=r"^maps: none given; expected --maps, --bits"):
        run("eval")
    with pytest.raises(ValueError, match=r"^transforms: got \(kind"):
        run("eval", "--bits", 3, "--transforms", other)


def test_export_hands_codes_on(bases, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    seen = []
    monkeypatch.setattr(
        "exporters.onnx.export.export_decoder",
        lambda model, config, maps, out, **more: seen.append((config, more.get("transforms"))),
    )
    for codes in ((), ("--bits", 4), ("--transforms", bases)):
        result = run("export", "onnx", "--out", tmp_path / "x", *codes)
        assert result.exit_code == 0, result.output
    assert [config.quantization for config, _ in seen] == [
        None,
        lc.Quantization(4, 4),
        lc.Quantization(3, 2, "calibrated"),
    ]
    assert seen[0][1] is seen[1][1] is None
    assert seen[2][1].digest == lc.Transforms.load(bases / FILE).digest


def test_bench_times_coded_slots_beside_others():
    shape = ("--context", 256, "--batch", 1, "--query-heads", 2, "--kv-heads", 1, "--head-dim", 16)
    result = run("bench", *shape, "--bits", 3, "--transform", "calibrated")
    assert result.exit_code == 0, result.output
    for name in ("LESS (torch)", "H2O alone, 3-bit slots", "LESS, 3-bit slots"):
        assert name in result.output
