"""`build_engines` over the fake: what TensorRT is told, and what becomes of what it says."""

import json
import os
import shlex
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from exporters.common.manifest import read_manifest
from less_cache.cli import app
from tests.exporters.tensorrt.conftest import CURRENT, C


def build_quietly(exported, out, **changes):
    from exporters.tensorrt import build_engines

    arguments = {"max_batch": 4, "max_prompt": 32, "progress": False, **changes}
    return build_engines(exported, out, **arguments)


def recorded(trt, method):
    return [call.arguments for call in trt.calls if call.method == method]


def test_two_engines_and_their_manifest(trt, exported, library, tmp_path):
    out = build_quietly(
        exported,
        tmp_path / "out",
        plugin=library,
        opt_batch=2,
        workspace=2**30,
        optimization_level=4,
    )
    names = {path.name for path in out.iterdir()}
    assert names == {"step.engine", "prompt.engine", "less_cache_engine.json", library.name}
    data = json.loads((out / "less_cache_engine.json").read_text())
    assert data["tensorrt"] == trt.__version__
    assert data["device"] == {"name": "Fake", "capability": [9, 0]}
    assert data["limits"] == {"max_batch": 4, "max_prompt": 32, "opt_batch": 2, "opt_prompt": 32}
    assert data["model"] == read_manifest(exported).data
    assert set(data["files"]) == names - {"less_cache_engine.json"}
    # The step alone works in place; float32 is not cut short to TF32.
    (feature,) = recorded(trt, "set_preview_feature")
    assert feature == {"feature": trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, "enable": True}
    assert recorded(trt, "clear_flag") == [{"flag": trt.BuilderFlag.TF32}] * 2
    pool = {"pool": trt.MemoryPoolType.WORKSPACE, "pool_size": 2**30}
    assert recorded(trt, "set_memory_pool_limit") == [pool] * 2
    assert recorded(trt, "builder_optimization_level") == [{"value": 4}] * 2


def test_profiles_cover_every_input(trt, exported, library, tmp_path):
    build_quietly(exported, tmp_path, plugin=library, opt_batch=2, opt_prompt=7)
    shapes = recorded(trt, "set_shape")
    inputs = read_manifest(exported).data["inputs"]
    assert [call["input"] for call in shapes] == [*inputs, *inputs]
    step, prompt = shapes[: len(inputs)], shapes[len(inputs) :]
    bounds = ("min", "opt", "max")
    assert [step[0][b] for b in bounds] == [(1, 1), (2, 1), (4, 1)]
    assert [prompt[0][b] for b in bounds] == [(1, 1), (2, 7), (4, 32)]
    assert [step[2][b] for b in bounds] == [(1,), (2,), (4,)]
    assert step[3]["max"] == prompt[3]["max"] == (4, 2, C, 12)


def test_aliasing_is_told_or_not(trt, exported, library, tmp_path):
    from exporters.tensorrt import TensorRTDecoder

    tokens = []
    for alias in (True, False):
        trt.calls.clear()
        built = build_quietly(exported, tmp_path / str(alias), plugin=library, alias=alias)
        assert len(recorded(trt, "set_preview_feature")) == alias
        for one_address in (True, False):
            decoder = TensorRTDecoder(built, one_address=one_address)
            tokens.append(decoder.generate(np.array([[5, 6, 7]]), max_new_tokens=12))
    for found in tokens[1:]:
        np.testing.assert_array_equal(found, tokens[0])


def test_without_the_plugin_nothing_is_in_place(trt, exported, tmp_path):
    build_quietly(exported, tmp_path)
    assert json.loads((tmp_path / "less_cache_engine.json").read_text())["plugin"] is None
    assert not recorded(trt, "set_preview_feature")
    assert not recorded(trt, "load_library")


def test_engines_are_built_on_the_gpu_that_was_asked_for(trt, exported, tmp_path):
    current = []
    trt.world.on_step = lambda: current.append(CURRENT[0])
    build_quietly(exported, tmp_path, device=1)
    assert set(current) == {1}
    assert CURRENT == [0]


def test_the_timing_cache_is_read_and_written(trt, exported, tmp_path):
    cache = tmp_path / "deep" / "times"
    build_quietly(exported, tmp_path / "a", timing_cache=cache)
    assert cache.read_bytes() == b"times:one more,one more,"
    assert recorded(trt, "create_timing_cache")[0] == {"serialized_timing_cache": b""}
    cache.write_bytes(b"of another kind")
    with pytest.raises(ValueError, match=r"timing_cache: .*times: of another TensorRT or GPU"):
        build_quietly(exported, tmp_path / "b", timing_cache=cache)
    assert not (tmp_path / "b").exists()


def test_what_the_parser_says_is_told(exported, library, tmp_path, monkeypatch):
    from exporters.tensorrt import build as module

    monkeypatch.setattr(module, "load_plugin", lambda path: None)
    with pytest.raises(
        ValueError, match=r"cannot read it: LessAttention layers\.0\.LessAttention: no"
    ):
        build_quietly(exported, tmp_path / "out", plugin=library)
    assert not (tmp_path / "out").exists()


def test_what_the_builder_says_is_told(trt, exported, tmp_path):
    trt.world.fail_build = "Could not find any implementation for node X"
    with pytest.raises(RuntimeError, match="cannot build an engine: Could not find any implem"):
        build_quietly(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_build_and_leaves_the_old_one(trt, exported, tmp_path):
    build_quietly(exported, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    handler = signal.getsignal(signal.SIGINT)
    trt.world.on_step = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_quietly(exported, tmp_path, max_batch=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_bars_show_phases_as_they_nest(trt, capsys):
    from exporters.tensorrt.progress import Monitor

    with Monitor("step") as monitor:
        monitor.phase_start("Building", None, 5)
        monitor.phase_start("Tactics", "Building", 2)
        assert monitor.step_complete("Tactics", 0)
        described = [task.description for task in monitor._bars.tasks]
        assert described == ["step: Building", "  Tactics"]
        assert [task.completed for task in monitor._bars.tasks] == [0, 1]
        monitor.phase_finish("Tactics")
        # Phases may end early, and out of order.
        monitor.phase_finish("Building")
        assert monitor.step_complete("Tactics", 1)
        assert not monitor._bars.tasks
        os.kill(os.getpid(), signal.SIGINT)
        assert not monitor.step_complete("Building", 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch: got 0"),
        ({"max_prompt": 1}, ValueError, "max_prompt: got 1"),
        ({"max_prompt": 3832}, ValueError, "max_prompt: got 3832, expected at most 3831: Tensor"),
        ({"opt_batch": 5}, ValueError, "opt_batch: got 5"),
        ({"opt_prompt": 33}, ValueError, "opt_prompt: got 33"),
        ({"workspace": 0}, ValueError, "workspace: got 0"),
        ({"optimization_level": 6}, ValueError, "optimization_level: got 6"),
        ({"plugin": "nowhere.so"}, FileNotFoundError, "plugin: nowhere.so: no such file"),
        ({"plugin": __file__}, ValueError, "finds no plugin LessAttention"),
    ],
)
def test_what_is_refused(exported, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        build_quietly(exported, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_prompts_are_as_long_as_their_order_can_be_found(exported):
    from exporters.tensorrt.limits import check_limits

    manifest = read_manifest(exported)
    manifest.data["layers"][0]["runs"][0]["capacity"] = 1919
    check_limits(manifest, 1, 1920)
    with pytest.raises(ValueError, match="max_prompt: got 1921, expected at most 1920"):
        check_limits(manifest, 1, 1921)
    # A larger cache is not sorted: its order is counted.
    manifest.data["layers"][0]["runs"][0]["capacity"] = 1920
    check_limits(manifest, 1, 8192)


def test_engines_built_elsewhere_are_described(trt, exported, library, tmp_path):
    from exporters.tensorrt import TensorRTDecoder, describe_engines

    build_quietly(exported, tmp_path, plugin=library)
    (tmp_path / "less_cache_engine.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"less_cache_engine.json: no such file"):
        TensorRTDecoder(tmp_path)
    describe_engines(exported, tmp_path, max_batch=4, max_prompt=32, plugin=library)
    tokens = TensorRTDecoder(tmp_path).generate(np.array([[5, 6]]), max_new_tokens=3)
    assert tokens.shape[0] == 1
    (tmp_path / "step.engine").unlink()
    with pytest.raises(FileNotFoundError, match=r"step.engine: no such file"):
        describe_engines(exported, tmp_path, max_batch=4, max_prompt=32)


def test_the_command_builds(exported, library, tmp_path):
    arguments = ["--onnx", exported, "--out", tmp_path, "--plugin", library, "--max-prompt", 16]
    result = CliRunner().invoke(app, ["export", "tensorrt", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "less_cache_engine.json").is_file()


@pytest.mark.parametrize("tool", ["trtexec", "polygraphy"])
def test_lines_for_nvidias_tools_name_every_input(exported, tool):
    from exporters.tensorrt.trtexec import PREVIEW, command_lines

    step, prompt = (
        shlex.split(line)
        for line in command_lines(exported, "my engines", plugin="a plugin.so", tool=tool)
    )
    assert any("a plugin.so" in word for word in step)
    assert not any("plugin" in word.lower() for word in prompt)
    plain, _ = command_lines(exported, "my engines", plugin="a plugin.so", alias=False, tool=tool)
    told = [word for word in step if word not in shlex.split(plain)]
    assert told == PREVIEW[tool]
    names = read_manifest(exported).data["inputs"]
    if tool == "trtexec":
        (largest,) = (word for word in prompt if word.startswith("--maxShapes="))
        shapes = largest.removeprefix("--maxShapes=").split(",")
        assert shapes[0] == "input_ids:1x512"
        assert shapes[3] == f"past.0.keys:1x2x{C}x12"
    else:
        start = prompt.index("--trt-max-shapes") + 1
        shapes = prompt[start : start + len(names)]
        assert shapes[0] == "input_ids:[1,512]"
        assert shapes[3] == f"past.0.keys:[1,2,{C},12]"
    assert [shape.split(":")[0] for shape in shapes] == names


def test_the_lines_are_printed(exported, capsys):
    from exporters.tensorrt.trtexec import main

    main([str(exported), "--max-batch", "2", "--polygraphy"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("polygraphy convert ") for line in lines)
    assert "step.standard.onnx" in lines[0]
