"""``--cache``: a whole cache from one folder, on every command that chooses one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model
from less_cache.backends import BACKENDS
from less_cache.evaluation.comparison import BASELINE_PLUS, FULL, POLICY
from less_cache.integrations.introspection import description
from less_cache.recipe import FILE
from tests.integrations.models import build, less
from tests.quantization.fitted import fitted

SLOTS = [[8, 12], [12, 20]]
LENGTH = ("--length", 40, "--windows", 2, "--prompts", 1, "--new-tokens", 4)


def run(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)], catch_exceptions=False)


def recipe_for(model, *, rank=4, coded=True, slots=SLOTS):
    config, maps = less(model, capacity=slots, policy=lc.DecayedH2O(), rank=rank or 4)
    bits = lc.Quantization(3, 4, "calibrated") if coded else None
    config = config.replace(rank=rank, quantization=bits)
    return lc.CacheRecipe(
        config,
        maps if rank else None,
        fitted(config) if coded else None,
        model=description(model.config),
        record={"budget": "5%", "curve": [*range(300)]},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its caches, one of another model, and token ids to read."""
    folder = tmp_path_factory.mktemp("place")
    model, other = build("llama", head_dim=16), build("qwen3")
    model.save_pretrained(folder / "model")
    recipe_for(model).save_pretrained(folder / "cache")
    recipe_for(model, rank=0, coded=False).save_pretrained(folder / "plain")
    recipe_for(other).save_pretrained(folder / "of-another")
    recipe_for(model).maps.save_pretrained(folder / "maps")
    (folder / "damaged").mkdir()
    (folder / "damaged" / FILE).write_bytes((folder / "cache" / FILE).read_bytes()[:-9])
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 97, 400))
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A cache that ships with the reference model at 5 %."""
    config = lc.CacheConfig(
        6, 4, 4, 64, capacity=[[16, 40, 24, 24]] * 6, policy=lc.SinkWindow(), rank=0,
        max_positions=1024, quantization=lc.Quantization(3, 3),
    )  # fmt: skip
    monkeypatch.setattr(reference_model, "TUNED", tmp_path / "tuned")
    made = lc.CacheRecipe(config, model={"model_type": "llama", "num_layers": 6})
    made.save_pretrained(tmp_path / "tuned" / "5-percent")
    return tmp_path / "tuned" / "5-percent"


def test_eval_judges_what_is_in_the_folder(place, tmp_path):
    common = ("--model", place / "model", "--data", place / "ids.npy", *LENGTH)
    result = run("eval", "--cache", place / "cache", *common, "--out", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    assert "cache, in 3 and 4 bits" in result.output
    assert "warning" not in result.output
    told = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    names = [FULL, POLICY, "slots of 3 and 4 bits", BASELINE_PLUS, "LESS"]
    assert [row["name"] for row in told["caches"]] == names
    # The same from its parts.
    made = lc.CacheRecipe.from_pretrained(place / "cache")
    made.transforms.save(tmp_path / "bases.safetensors")
    parts = ("--maps", place / "maps", "--transforms", tmp_path / "bases.safetensors")
    parts += ("--capacity", json.dumps(SLOTS), "--policy", "decayedh2o")
    assert run("eval", *parts, *common, "--out", tmp_path / "parts").exit_code == 0
    again = json.loads((tmp_path / "parts" / "comparison.json").read_text())
    assert again["caches"] == told["caches"]


def test_eval_of_a_policy_alone_has_no_line_twice(place, tmp_path):
    common = ("--model", place / "model", "--data", place / "ids.npy", *LENGTH)
    result = run("eval", "--cache", place / "plain", *common, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["name"] for row in told["caches"]] == [FULL, POLICY]
    assert told["capacity"] == SLOTS


CODES = ("bits", "key-bits", "value-bits", "transform")
CHOOSING = {
    ("eval",): ("capacity", "policy", "maps", "transforms", *CODES),
    ("longrange", "--out", "o"): ("capacity", "policy", "maps"),
    ("export", "onnx", "--out", "o"): ("capacity", "policy", "maps", "transforms", *CODES),
    ("reproduce", "--table", "c4", "--out", "o"): ("share", "policy", "maps"),
    ("bench",): ("capacity", "query-heads", "kv-heads", "head-dim", *CODES),
}
"""By command: its options that a whole cache replaces."""


@pytest.mark.parametrize("command", CHOOSING, ids=lambda command: command[0])
def test_what_a_cache_says_is_not_said_again(command, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for option in CHOOSING[command]:
        name = option.replace("-", "_")
        message = f"^{name}: given beside --cache, which has its own; leave out --{option}$"
        with pytest.raises(ValueError, match=message):
            run(*command, "--cache", place / "cache", f"--{option}", "3")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere", FileNotFoundError, "^cache: .*nowhere: no such folder"),
        ("maps", FileNotFoundError, "^cache: .*maps: holds feature maps only.*use --maps"),
        ("model", FileNotFoundError, f"^cache: .*model: holds no {FILE}"),
        ("damaged", ValueError, f"{FILE}: .*truncated"),
    ],
)
def test_folders_without_a_whole_cache_are_told(name, kind, message, place, monkeypatch):
    monkeypatch.setattr(cli.loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for command in ("eval", "info", "bench"):
        with pytest.raises(kind, match=message):
            run(command, "--cache", place / name)


def test_caches_of_another_model_are_refused_with_what_differs(place, tmp_path):
    message = r"^cache: .*of-another: made for a model of .*model_type = 'qwen3', but .* 'llama'"
    given = ("--cache", place / "of-another", "--model", place / "model")
    for command in (("eval", "--data", place / "ids.npy"), ("export", "onnx"), ("longrange",)):
        with pytest.raises(ValueError, match=message):
            run(*command, *given, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_whole_cache_is_no_folder_of_maps(place):
    with pytest.raises(ValueError, match=r"^maps: .*cache holds a whole cache; use --cache"):
        run("info", "--maps", place / "cache")


def test_info_tells_what_a_cache_is(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = run("info", "--cache", place / "cache")
    assert result.exit_code == 0, result.output
    made = lc.CacheRecipe.from_pretrained(place / "cache")
    told = dict(
        line.strip().split("  ", 1) for line in result.output.splitlines() if "  " in line.strip()
    )
    told = {name: text.strip() for name, text in told.items()}
    assert told["digest"] == made.digest
    assert told["their bases"] == made.transforms.digest
    assert told["pairs stored"] == "in 3 and 4 bits (calibrated)"
    assert told["policy"] == "DecayedH2O(sinks=0, recent=None, factor=0.99)"
    assert told["budget"] == "5%"
    assert told["curve"].startswith("[0, 1, 2,")
    assert told["curve"].endswith("...")
    assert "model_type = 'llama'" in told["for the model"]
    # 2 layers of 2 KV heads: keys and values of 16 numbers, of 2 bytes, at 128 tokens.
    full = 2 * 2 * 2 * 16 * 2 * 128
    assert told["bytes a sequence"] == (
        f"{made.config.bytes_per_sequence():,}, {made.config.bytes_per_sequence() / full:.2%} "
        "of the full cache's in 16 bits at 128 tokens"
    )
    lines = [line.split() for line in result.output.splitlines()[-3:]]
    assert lines == [
        ["slots", "by", "KV", "head", "0", "1"],
        ["layer", "0", "8", "12"],
        ["layer", "1", "12", "20"],
    ]


def test_bytes_of_uncoded_pairs_are_counted_in_16_bits(place):
    made = lc.CacheRecipe.from_pretrained(place / "plain")
    assert made.config.dtype == "float32"
    assert made.bytes_per_sequence == made.config.bytes_per_sequence("bfloat16")
    assert made.bytes_per_sequence < made.config.bytes_per_sequence()
    unknown = lc.CacheRecipe(made.config.replace(max_positions=None, capacity=9))
    assert unknown.share is None
    assert "of the full cache" not in unknown.card()


def test_bench_times_all_layers_of_a_cache(place, monkeypatch):
    # To compile takes longer than all the rest.
    monkeypatch.delitem(BACKENDS, "inductor")
    result = run("bench", "--cache", place / "cache", "--batch", 2)
    assert result.exit_code == 0, result.output
    assert "All 2 layers of cache, one step: 128 tokens, batch 2" in result.output
    made = lc.CacheRecipe.from_pretrained(place / "cache")
    line = next(line for line in result.output.splitlines() if "this cache (torch)" in line)
    assert f"{made.config.bytes_per_sequence():,}" in line
    with pytest.raises(ValueError, match=r"^context: got 8, expected at least the 20 slots"):
        run("bench", "--cache", place / "cache", "--context", 8)


def test_export_writes_the_cache_that_attach_runs(place, tmp_path):
    onnx = pytest.importorskip("exporters.onnx")
    given = ("--model", place / "model", "--cache", place / "cache")
    result = run("export", "onnx", *given, "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    model = build("llama", head_dim=16)
    ids = torch.arange(5, 45).unsqueeze(0)
    with lc.attach(model, place / "cache"), torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    decoder = onnx.OnnxDecoder(tmp_path / "o", threads=1)
    made = lc.CacheRecipe.from_pretrained(place / "cache")
    assert decoder.manifest.config == made.config
    assert decoder.generate(ids.numpy(), max_new_tokens=12).tolist() == wanted.tolist()


def test_genai_is_handed_all_parts(place, tmp_path, monkeypatch):
    genai = pytest.importorskip("exporters.onnx.genai")
    seen = []
    monkeypatch.setattr(
        genai,
        "export_genai",
        lambda model, config, maps, out, **more: seen.append((config, maps, more["transforms"])),
    )
    given = ("--model", place / "model", "--cache", place / "cache", "--dtype", "float16")
    result = run("export", "onnx", *given, "--format", "genai", "--out", tmp_path / "o")
    assert result.exit_code == 0, result.output
    made = lc.CacheRecipe.from_pretrained(place / "cache")
    ((config, maps, transforms),) = seen
    assert config == made.config.with_dtype("float16")
    assert (maps.digest, transforms.digest) == (made.maps.digest, made.transforms.digest)


def test_longrange_asks_the_cache_that_was_given(shipped, tmp_path, monkeypatch):
    from less_cache.evaluation import long_range

    seen = []

    def measured(model, tokenizer, contestants, *rest, **more):
        seen.extend(contestants)
        raise KeyboardInterrupt

    monkeypatch.setattr(long_range, "measure_long_range", measured)
    given = ("--cache", "reference:5%", "--out", tmp_path / "o", "--tasks", "text")
    assert run("longrange", *given).exit_code == 130
    assert [entry.name for entry in seen] == [FULL, POLICY, "3-bit slots"]
    made = lc.CacheRecipe.from_pretrained(shipped)
    assert seen[2].config == made.config
    # Of 16 slots in 3 bits there would be fewer than the sinks.
    assert {slots for layer in seen[1].config.capacities for slots in layer} == {6}
    bases = fitted(made.config.replace(quantization=lc.Quantization(3, 3, "calibrated")))
    told = long_range._told(long_range.Contestant("x", made.config, None, bases))
    assert told["transforms"] == bases.digest


def test_reproduce_measures_the_cache_beside_the_full_one(shipped, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(reference_model.held_out_documents()[3].text[:500])
    given = ("--table", "c4", "--data", text, "--out", tmp_path / "o", "--cache", "reference:5%")
    result = run("reproduce", *given)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output
    told = json.loads((tmp_path / "o" / "table.json").read_text())
    assert [line["cache"] for line in told["lines"]] == [FULL, "reference:5%"]
    assert [line["slots"] for line in told["lines"]] == [None, [16, 40, 24, 24]]
    assert told["caches"] == {"reference:5%": lc.CacheRecipe.from_pretrained(shipped).digest}
    values = [line["values"]["token perplexity"] for line in told["lines"]]
    assert values[0] < values[1]


def test_shipped_caches_are_had_by_their_budget(shipped):
    assert reference_model.tuned("5%") == reference_model.tuned(0.05) == shipped
    assert reference_model.tuned("0.05") == shipped
    assert reference_model.cache_folder("reference:5%") == shipped
    assert reference_model.cache_folder("owner/name") == "owner/name"
    made = lc.CacheRecipe.from_pretrained(shipped)
    made.save_pretrained(shipped.parent / "2.5-percent")
    (shipped.parent / "1.25-percent").mkdir()
    assert reference_model.tuned(0.025).name == "2.5-percent"
    with pytest.raises(ValueError, match=r"budget: got '7%', .* reference model: 2.5%, 5%$"):
        reference_model.tuned("7%")
    with pytest.raises(ValueError, match=r"budget: got 'x'"):
        reference_model.tuned("x")
    for budget in (True, None, [0.05]):
        with pytest.raises(TypeError, match=r"^budget: got"):
            reference_model.tuned(budget)


def test_without_any_that_ships_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_model, "TUNED", tmp_path)
    with pytest.raises(ValueError, match=r"budget: got '5%', .*: none does$"):
        run("info", "--cache", "reference:5%")
