"""Folders of engines that are damaged, or for another TensorRT, GPU or model, are refused."""

import json
import shutil

import pytest

from exporters.common.folders import described


def damaged(engines, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(engines, copy)
    change(copy)
    return copy


def edit(**changes):
    def change(copy):
        path = copy / "less_cache_engine.json"
        data = json.loads(path.read_text())
        data.update(changes)
        path.write_text(json.dumps(data))

    return change


def edit_files(change):
    def apply(copy):
        files = json.loads((copy / "less_cache_engine.json").read_text())["files"]
        change(files)
        edit(files=files)(copy)

    return apply


def shorten(copy):
    path = copy / "step.engine"
    path.write_bytes(path.read_bytes()[:-3])


def spoil(copy):
    path = copy / "prompt.engine"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def unreadable(copy):
    spoil(copy)
    name = "prompt.engine"
    edit_files(lambda files: files.update({name: described(copy / name)}))(copy)


def swapped(copy):
    (copy / "libless_cache_plugin.so").rename(copy / "other.so")
    edit_files(lambda files: files.update({"other.so": files.pop("libless_cache_plugin.so")}))(copy)
    edit(plugin="other.so")(copy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (shorten, ValueError, "step.engine: truncated"),
        (spoil, ValueError, "prompt.engine: not the file"),
        (unreadable, ValueError, "prompt.engine: TensorRT cannot read it: Magic tag"),
        (lambda copy: (copy / "step.engine").unlink(), FileNotFoundError, "step.engine: missing"),
        (lambda copy: (copy / "less_cache_engine.json").unlink(), FileNotFoundError, "no such"),
        (edit(format="x"), ValueError, "format: got 'x'"),
        (edit(tensorrt="9.1.0.4"), ValueError, "engines of TensorRT 9.1.0.4, but this is"),
        (
            edit(device={"name": "Other", "capability": [8, 0]}),
            ValueError,
            r"engines for Other \(compute capability 8.0\), but this GPU is Fake",
        ),
        (edit(limits={"max_batch": 1}), ValueError, "limits: lacks .*max_prompt"),
        (edit(device=None), ValueError, "device: got None, expected an object"),
        (edit(model={}), ValueError, "json: model: lacks .*config"),
        (edit(plugin="/other.so"), ValueError, r"files: lacks \['/other.so'\]"),
        (
            edit_files(lambda files: files.pop("step.engine")),
            ValueError,
            r"files: lacks \['step.engine'\]",
        ),
        (
            edit_files(lambda files: files.update({"../step.engine": files["step.engine"]})),
            ValueError,
            r"files: got '../step.engine', expected files inside the folder",
        ),
        (swapped, ValueError, "finds no plugin LessAttention, version 1"),
    ],
)
def test_engines_of_another_place_and_damaged_ones_are_refused(
    engines, tmp_path, change, error, message
):
    from exporters.tensorrt import TensorRTDecoder

    with pytest.raises(error, match=message):
        TensorRTDecoder(damaged(engines, tmp_path, change))


def test_engines_of_another_model_are_refused(engines, tmp_path):
    from exporters.tensorrt import TensorRTDecoder

    def change(copy):
        path = copy / "less_cache_engine.json"
        data = json.loads(path.read_text())
        data["model"]["inputs"].append("past.5.keys")
        path.write_text(json.dumps(data))

    with pytest.raises(ValueError, match=r"lacks the tensors \['past.5.keys'\]"):
        TensorRTDecoder(damaged(engines, tmp_path, change))
