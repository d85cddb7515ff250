"""The command line, on the shipped model and tiny runs."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model
from less_cache._checks import check_choice
from less_cache.cli import loading, telling
from less_cache.feature_maps import FeatureMaps
from less_cache.policies import POLICIES, register_policy
from tests.helpers import small_config
from tests.policies import MostSeen

runner = CliRunner()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(reference_model.held_out_documents()[0].text[:8000])
    return path


@pytest.fixture(scope="module")
def maps(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps")
    arguments = ["train", "--data", str(text), "--out", str(out), "--length", "96"]
    arguments += ["--sequences", "8", "--capacity", "16", "--recipe", "fast", "--epochs", "1"]
    result = runner.invoke(cli.app, [*arguments, "--hidden", "8"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Validation error" in result.output
    return out


def test_train_then_distill_then_eval(maps, text, tmp_path):
    distilled = tmp_path / "distilled"
    arguments = ["distill", "--data", str(text), "--maps", str(maps), "--out", str(distilled)]
    arguments += ["--length", "96", "--capacity", "16", "--steps", "2", "--batch", "1"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = tmp_path / "report"
    arguments = ["eval", "--data", str(text), "--out", str(report), "--length", "96"]
    arguments += ["--maps", f"LESS={maps}", "--maps", f"LESS distilled={distilled}"]
    arguments += ["--capacity", "16", "--windows", "4", "--prompts", "2", "--new-tokens", "4"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    data = json.loads((report / "comparison.json").read_text())
    assert [cache["name"] for cache in data["caches"]][3:] == ["LESS", "LESS distilled"]
    assert data["windows"] == 4
    for out in (maps, distilled):
        assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_layers_in_parts_are_merged(text, tmp_path):
    common = ["--data", str(text), "--length", "96", "--sequences", "6", "--capacity", "16"]
    common += ["--recipe", "fast", "--epochs", "1", "--hidden", "4", "--policy", "sinkwindow"]
    for part in ("0:3", "3:6"):
        out = str(tmp_path / part.replace(":", "-"))
        result = runner.invoke(
            cli.app, ["train", *common, "--out", out, "--layers", part], catch_exceptions=False
        )
        assert "still missing" in result.output
    whole = tmp_path / "whole"
    folders = [str(tmp_path / "0-3"), str(tmp_path / "3-6")]
    result = runner.invoke(cli.app, ["merge", *folders, "--out", str(whole)])
    assert result.exit_code == 0, result.output
    assert len(FeatureMaps.from_pretrained(whole)) == 6


def test_info_describes_machine_and_maps(maps):
    result = runner.invoke(cli.app, ["info", "--maps", str(maps)], catch_exceptions=False)
    assert "backends" in result.output
    assert "per layer" in result.output


def test_info_tells_what_differs_by_layer(tmp_path):
    config = small_config(rank=[0, 2], quantization=[None, lc.Quantization(3, 3)])
    maps = lc.FeatureMaps.initialise(config, hidden=4)
    lc.FeatureMaps(maps.layers, record={"config": config.to_dict()}).save_pretrained(tmp_path)
    told = runner.invoke(cli.app, ["info", "--maps", str(tmp_path)], catch_exceptions=False).output
    words = " ".join(told.split())
    assert "for the rank 0 in layer 0, 2 in layer 1" in words
    assert "for pairs stored as they are in layer 0, in 3 bits (hadamard) in layer 1" in words


def run(monkeypatch, capsys, *arguments):
    """Exit status, output and error output of the command as a shell would run it."""
    monkeypatch.setattr("sys.argv", ["less-cache", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as exit_:
        status = exit_.code
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.fixture
def folder(text, tmp_path, monkeypatch):
    """A working folder with things in it that are not what they are taken for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "text.txt").write_text(text.read_text())
    (tmp_path / "a-file").write_text("no folder")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "object.json").write_text('{"capacity": 52}')
    (tmp_path / "ids.npy").mkdir()
    (tmp_path / "no-model").mkdir()
    (tmp_path / "half-a-model").mkdir()
    (tmp_path / "half-a-model" / "config.json").write_text("{")
    return tmp_path


TRAIN = ("train", "--data", "text.txt", "--out", "out")
MISTAKES = {
    "no-data": (("train", "--data", "nowhere", "--out", "out"), "no file or folder"),
    "empty-data": (("train", "--data", "", "--out", "out"), "data: got an empty name"),
    "npy-folder": (("train", "--data", "ids.npy", "--out", "out"), "data: ids.npy is no file"),
    "recipe": ((*TRAIN, "--recipe", "best"), "recipe"),
    "capacity": ((*TRAIN, "--capacity", "many"), "capacity"),
    "capacity-json": ((*TRAIN, "--capacity", "[52, [16,"), "capacity: [52, [16,: no valid JSON"),
    "capacity-deep": ((*TRAIN, "--capacity", "deep.json"), "deep.json: its JSON is nested too"),
    "capacity-nested": ((*TRAIN, "--capacity", "[[[52]]]"), "capacity: layer 0 has [52]"),
    "capacity-bool": ((*TRAIN, "--capacity", "[true]"), "capacity: layer 0 has True"),
    "capacity-object": ((*TRAIN, "--capacity", "object.json"), "object.json holds dict"),
    "capacity-file": ((*TRAIN, "--capacity", "x.json"), "capacity: x.json is no file"),
    "capacity-heads": ((*TRAIN, "--capacity", "[11,12,13,14,15,[16]]"), "capacity: got 1 entries"),
    "capacity-memory": ((*TRAIN, "--capacity", "5000000000000"), "GB of memory; cpu has"),
    "policy": ((*TRAIN, "--policy", "lru"), "policy"),
    "full-cache": ((*TRAIN, "--policy", "fullcache", "--capacity", "8"), "evicts nothing"),
    "layers": ((*TRAIN, "--length", "64", "--layers", "5:9"), "layers: got '5:9'"),
    "rank": (
        (*TRAIN, "--length", "96", "--rank", "100000000"),
        "capacity, rank: got 0.05, 100000000",
    ),
    "dtype": ((*TRAIN, "--dtype", "int8"), "dtype"),
    "device": ((*TRAIN, "--device", "banana"), "device: got 'banana'"),
    "gpu": ((*TRAIN, "--device", "cuda:77"), "device: got 'cuda:77'"),
    "meta": ((*TRAIN, "--device", "meta"), "device: got 'meta', which does not work"),
    "out": (("train", "--data", "text.txt", "--out", "a-file"), "out: a-file is a file"),
    "hpu": ((*TRAIN, "--device", "hpu"), "device: got 'hpu', which does not work"),
    "out-below": (("train", "--data", "text.txt", "--out", "a-file/x"), "out: a-file is a file"),
    "model-id": ((*TRAIN, "--model", "nobody/nothing-at-all"), "model: 'nobody/nothing-at-all'"),
    "model-file": ((*TRAIN, "--model", "a-file"), "model: 'a-file' cannot be loaded"),
    "model-folder": ((*TRAIN, "--model", "no-model"), "model: 'no-model' cannot be loaded"),
    "model-half": ((*TRAIN, "--model", "half-a-model"), "model: 'half-a-model' cannot be loaded"),
    "model-empty": ((*TRAIN, "--model", ""), "model: got an empty name"),
    "eval-out": (("eval", "--maps", "{maps}", "--out", "a-file"), "out: a-file is a file"),
    "eval-data": (("eval", "--maps", "{maps}", "--data", "nowhere"), "no file or folder"),
    "maps": (("eval", "--maps", "a=nowhere"), "nowhere"),
    "maps-hub": (("eval", "--maps", "nobody/nothing-at-all"), "no such folder, and the hub gave"),
    "maps-twice": (("eval", "--maps", "a={maps}", "--maps", "a={maps}"), "each name once"),
    "maps-name": (("eval", "--maps", "Baseline+={maps}"), "the name 'Baseline+'"),
    "new-tokens": (("eval", "--maps", "{maps}", "--length", "64"), "new_tokens: got 64"),
    "gpus": ((*TRAIN, "--gpus", "1"), "gpus: got 1 without --ray"),
    "ray-gpus": ((*TRAIN, "--ray", "auto", "--device", "cuda"), "needs some of a worker's: --gpus"),
    "ray-empty": ((*TRAIN, "--ray", ""), "ray: got ''"),
    "merge": (("merge", "nowhere", "--out", "out"), "run.json"),
    "bench": (("bench", "--capacity", "0"), "capacity"),
    "bench-memory": (("bench", "--context", "1000000000000"), "head_dim: got 1000000000000, 8"),
    "bench-maps": (("bench", "--head-dim", "10000000", "--context", "1"), "of memory; cpu has"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_in_a_line(arguments, message, folder, maps, monkeypatch, capsys):
    arguments = [argument.replace("{maps}", str(maps)) for argument in arguments]
    status, _, told = run(monkeypatch, capsys, *arguments)
    assert status == 2
    last = told.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert message in last
    assert "Traceback" not in told
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (*TRAIN, "--sequences", "0"),
        (*TRAIN, "--sequences", "-3"),
        (*TRAIN, "--batch", "0"),
        ("bench", "--batch", "-1"),
        ("eval", "--maps", "x", "--windows", "0"),
    ],
)
def test_numbers_out_of_range_are_told(arguments, folder, monkeypatch, capsys):
    status, _, told = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "than or equal to" in told


def test_a_folder_that_may_not_be_written_to_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    status, _, told = run(monkeypatch, capsys, *TRAIN)
    assert status == 2
    assert "out: . may not be written to" in told


def test_data_is_looked_at_before_the_model_is_loaded(folder, maps, monkeypatch, capsys):
    monkeypatch.setattr(reference_model, "load", lambda **_: pytest.fail("the model was loaded"))
    for command in ("train", "eval", "distill"):
        given = ["--maps", maps] if command != "train" else []
        arguments = [command, "--data", "nowhere", "--out", "out", *given]
        status, _, told = run(monkeypatch, capsys, *arguments)
        assert status == 2
        assert "no file or folder" in told


@pytest.mark.parametrize(
    "text", ["install less_cache[tensorrt]", "[batch, heads]", "a[/b]c", "[bold]x[/]", "x" * 200]
)
def test_errors_and_paths_are_told_as_they_are(text, monkeypatch, capsys):
    def command():
        check_choice(text, 1, [2])

    with pytest.raises(SystemExit):
        telling.plain_errors(command)
    assert capsys.readouterr().err == f"error: {text}: got 1, expected one of 2\n"
    telling.say(text)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    "broken",
    [
        lambda: 1 <= "x",
        lambda: int("x"),
        lambda: check_choice(),
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: importlib.import_module("less_cache.nothing_of_that_name"),
    ],
)
def test_our_own_defects_keep_their_traceback(broken):
    with pytest.raises((TypeError, ValueError, RuntimeError, ImportError)):
        telling.plain_errors(broken)


def test_ctrl_c_tells_how_to_go_on(folder, monkeypatch, capsys):
    def stopped(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("less_cache.training.train", stopped)
    status, _, told = run(monkeypatch, capsys, *TRAIN, "--length", "96")
    assert status == 130
    assert "The same command goes on from the last checkpoint" in told


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_process_that_is_interrupted_tells_how_to_go_on(folder):
    """Ctrl-C as a terminal sends it, amid the fit; the same command then goes on."""
    command = [sys.executable, "-m", "less_cache.cli", "--verbose", *TRAIN, "--length", "64"]
    command += ["--sequences", "6", "--hidden", "4", "--capacity", "16", "--recipe", "fast"]
    command += ["--layers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [*command, "--epochs", "1000000"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    told = ""
    try:
        while "step 10:" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        process.send_signal(signal.SIGINT)
        told += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Stopped. The same command goes on from the last checkpoint." in told
    assert "Traceback" not in told


def test_verbose_tells_each_step_and_nothing_does_so_unasked(folder, monkeypatch, capsys):
    arguments = [*TRAIN, "--length", "64", "--sequences", "6", "--hidden", "4", "--epochs", "1"]
    arguments += ["--capacity", "16", "--layers", "0"]
    told = run(monkeypatch, capsys, *arguments)[2]
    assert "less_cache.training" not in told
    for name in telling.OURS:
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    told = run(monkeypatch, capsys, "--verbose", *arguments)[2]
    assert "less_cache.cli.loading: model: reference, float32 on cpu" in told
    assert "less_cache.training.data: data: text.txt: 1 documents" in told
    assert "less_cache.training.per_layer: layer 0: fitted before" in told


def test_divergence_is_an_error_and_no_json_holds_infinity(folder, monkeypatch, capsys):
    arguments = [*TRAIN, "--length", "96", "--sequences", "6", "--capacity", "16", "--hidden", "4"]
    arguments += ["--epochs", "1", "--learning-rate", "1e30", "--layers", "0"]
    status, _, told = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "learning_rate: got 1e+30" in told
    for path in folder.glob("out/**/*.json*"):
        for line in path.read_text().splitlines():
            assert "Infinity" not in line
            assert "NaN" not in line


def test_a_refused_run_does_not_block_the_corrected_one(folder, monkeypatch, capsys):
    common = [*TRAIN, "--length", "64", "--sequences", "6", "--hidden", "4", "--epochs", "1"]
    status, _, told = run(monkeypatch, capsys, *common, "--capacity", "64")
    assert status == 2
    assert "lose nothing" in told
    status, *_ = run(monkeypatch, capsys, *common, "--capacity", "32", "--layers", "0")
    assert status == 0
    status, _, told = run(monkeypatch, capsys, *common, "--capacity", "40", "--layers", "0")
    assert status == 2
    assert "config.capacity: 32 there, 40 now" in told
    assert len(told.strip().splitlines()[-1]) < 200


def test_the_next_command_is_complete(folder, monkeypatch, capsys):
    out = "folder of maps"
    arguments = ["train", "--data", "text.txt", "--out", out, "--length", "64", "--sequences", "6"]
    arguments += ["--hidden", "4", "--epochs", "1", "--policy", "sinkwindow:sinks=2"]
    arguments += ["--capacity", "[16, 16, 16, 16, 16, [8, 12, 16, 20]]", "--recipe", "fast"]
    status, told, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    command = shlex.split(told.strip().splitlines()[-1])
    assert command[:2] == ["less-cache", "eval"]
    more = ["--length", "64", "--windows", "2", "--new-tokens", "4", "--data", "text.txt"]
    status, told, complaints = run(monkeypatch, capsys, *command[1:], *more)
    assert status == 0
    assert "warning" not in complaints
    assert "8 to 20" in told
    assert "Written: report/comparison.json, report/positions.png, report/recovery.png" in told


def test_maps_for_something_else_are_told_once_or_refused(maps, folder, monkeypatch, capsys):
    more = ["--length", "96", "--windows", "1", "--prompts", "0", "--data", "text.txt"]
    arguments = ["eval", "--maps", maps, *more, "--capacity", "20", "--policy", "tova"]
    status, _, told = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert told.count("trained for SinkWindow(sinks=4, recent=0), not TOVA(sinks=0, recent=1)") == 1
    assert told.count("trained for a capacity of 16, not 20") == 1
    entry = FeatureMaps.from_pretrained(maps)
    FeatureMaps(entry.layers[:4], model_id="other").save_pretrained(folder / "shallow")
    status, _, told = run(monkeypatch, capsys, "eval", "--maps", "shallow", *more)
    assert status == 2
    assert "maps: 'LESS' does not fit the model: maps: made for 4 layers" in told
    FeatureMaps(entry.layers, model_id="other").save_pretrained(folder / "of-another")
    status, _, told = run(
        monkeypatch, capsys, "eval", "--maps", "of-another", *more, "--capacity", "16"
    )
    assert told.count("trained for the model other, not less_cache reference model") == 1


def test_sequences_longer_than_the_models_positions_are_warned_of(capsys):
    config = lc.CacheConfig(1, 2, 1, 8, capacity=4, policy=lc.H2O(), max_positions=64)
    assert loading.length_for(config, 64) == loading.length_for(config, None) == 64
    assert capsys.readouterr().err == ""
    assert loading.length_for(config, 65) == 65
    told = capsys.readouterr().err
    assert told == "warning: length: 65 is beyond the model's 64 positions\n"


def test_eval_takes_the_ids_that_train_takes(maps, folder, monkeypatch, capsys):
    np.save(folder / "tokens.npy", np.arange(400, dtype=np.uint16).reshape(4, 100) % 96)
    arguments = ["eval", "--maps", f"A={maps}", "--length", "96", "--prompts", "0"]
    arguments += ["--capacity", "16", "--data", "tokens.npy"]
    status, told, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "perplexity" in told
    data = json.loads((folder / "report" / "comparison.json").read_text())
    assert data["windows"] == 4


def test_info_and_eval_take_maps_alike(maps, monkeypatch, capsys):
    for given in (maps, f"my maps={maps}"):
        status, told, _ = run(monkeypatch, capsys, "info", "--maps", given)
        assert status == 0
        assert "SinkWindow(sinks=4, recent=0)" in told
        assert "for the capacity" in told
        assert "16" in told.partition("for the capacity")[2].splitlines()[0]


def test_a_folder_gives_maps_its_name_and_not_its_path(folder, monkeypatch, capsys):
    model, tokenizer = reference_model.load()
    model.save_pretrained(folder / "my-llama")
    tokenizer.save_pretrained(folder / "my-llama")
    arguments = ["--length", "64", "--sequences", "6", "--hidden", "4", "--epochs", "1"]
    arguments += ["--capacity", "16", "--recipe", "fast", "--model", folder / "my-llama"]
    status, *_ = run(monkeypatch, capsys, *TRAIN, *arguments)
    assert status == 0
    assert FeatureMaps.from_pretrained("out").model_id == "my-llama"
    assert str(folder).encode() not in (folder / "out" / "less_maps.safetensors").read_bytes()


def test_a_policy_of_ones_own_is_known_by_its_name(folder, monkeypatch, capsys):
    monkeypatch.setattr("less_cache.policies.registry.POLICIES", {**POLICIES})
    register_policy(MostSeen)
    arguments = [*TRAIN, "--length", "64", "--sequences", "6", "--hidden", "4", "--epochs", "1"]
    arguments += ["--policy", "mostseen", "--capacity", "16", "--layers", "0"]
    status, *_ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    run_json = json.loads((folder / "out" / "run.json").read_text())
    assert run_json["config"]["policy"][0]["name"] == "MostSeen"


def test_help_lists_the_policies_and_there_is_a_version(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    shown = run(monkeypatch, capsys, "train", "--help")[1]
    for name, policy in POLICIES.items():
        # Other tests register some of their own.
        if policy.__module__.startswith("less_cache."):
            assert name.lower() in shown
    assert run(monkeypatch, capsys, "--version")[1] == f"less_cache {lc.__version__}\n"


def test_bench_prints_a_line_for_each_cache():
    arguments = ["bench", "--context", "256", "--batch", "1", "--query-heads", "2"]
    arguments += ["--kv-heads", "1", "--head-dim", "16"]
    result = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("full cache", "H2O alone (torch)", "LESS (torch)"):
        assert name in result.output


def test_bench_takes_slots_by_head(monkeypatch, capsys):
    arguments = ["bench", "--context", "256", "--batch", "1", "--query-heads", "2"]
    arguments += ["--kv-heads", "2", "--head-dim", "16", "--capacity", "[8, 32]"]
    status, told, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    config = lc.CacheConfig(1, 2, 2, 16, capacity=[[8, 32]], policy=lc.H2O())
    assert f"{config.bytes_per_sequence():,}" in told
