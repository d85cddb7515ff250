"""Folders are replaced as a whole or not at all, and nobody else's by accident."""

import os
import subprocess
import sys

import pytest

from exporters.common.folders import check_target, listed, replaced_files
from less_cache._files import owner_tag

INDEX = "index.json"


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("there", [False, True])
def test_files_and_subfolders_move_in(tmp_path, there):
    out = tmp_path / "a" / "out"
    if there:
        write(out, templates__old="old", kept="kept", model="old")
    with replaced_files(out, INDEX) as folder:
        write(folder, templates__new="new", model="new")
        assert not there or contents(out)["model"] == "old"
        assert there or not out.exists()
    kept = {"kept": "kept"} if there else {}
    assert {name: text for name, text in contents(out).items() if text} == {
        "templates/new": "new",
        "model": "new",
        **kept,
    }
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_a_file_may_become_a_folder_and_a_folder_a_file(tmp_path):
    write(tmp_path, a__x="x", b="b")
    with replaced_files(tmp_path, INDEX) as folder:
        write(folder, b__y="y", a="a")
    assert contents(tmp_path) == {"a": "a", "b/y": "y"}


def test_an_error_leaves_everything_as_it_was(tmp_path):
    write(tmp_path, model="old")

    def fail():
        with replaced_files(tmp_path, INDEX, ["model"]) as folder:
            write(folder, model="new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert contents(tmp_path) == {"model": "old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="asks after processes as POSIX does")
@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_export_left_behind_goes_away(tmp_path, there):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out = tmp_path / "out"
    if there:
        out.mkdir()
    parent = out if there else tmp_path
    host = owner_tag().rpartition("-")[0]
    write(parent / f".export.{host}-{gone.pid}.abc" / "new", model="half")
    write(parent / f".export.{host}-{os.getpid()}.abc" / "new", model="of a living one")
    check_target(out, [INDEX], force=False)
    with replaced_files(out, INDEX) as folder:
        write(folder, model="new")
    left = {path.name for path in parent.iterdir()} - {"out", "model"}
    assert left == {f".export.{host}-{os.getpid()}.abc"}


def test_old_files_go_unless_they_are_new(tmp_path):
    write(tmp_path, model="old", template="old", kept="kept")
    with replaced_files(tmp_path, INDEX, ["model", "template", "never"]) as folder:
        write(folder, model="new")
    assert contents(tmp_path) == {"model": "new", "kept": "kept"}


def test_files_in_subfolders_are_listed(tmp_path):
    write(tmp_path, model="1234", templates__tool="12")
    found = {name: entry["bytes"] for name, entry in listed(tmp_path).items()}
    assert found == {"model": 4, "templates/tool": 2}


def test_a_folder_of_something_else_is_refused(tmp_path):
    check_target(tmp_path / "new", [INDEX], False)
    check_target(tmp_path, [INDEX], False)
    write(tmp_path, notes="mine")
    with pytest.raises(ValueError, match=r"out_dir: .* is not empty and holds no earlier export"):
        check_target(tmp_path, [INDEX], False)
    check_target(tmp_path, [INDEX], True)
    with pytest.raises(ValueError, match=r"out_dir: .* is a file"):
        check_target(tmp_path / "notes", [INDEX], True)
    write(tmp_path, **{INDEX: "{}"})
    check_target(tmp_path, [INDEX], False)
