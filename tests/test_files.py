"""Files that are replaced in one step, also where the process dies."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from less_cache._files import json_digest, json_text, owner_tag, replaced, write_text
from less_cache._tensor_files import write_tensors

KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path

    import torch

    import less_cache as lc
    {imports}

    folder = Path(sys.argv[1])
    {setup}
    save(0)
    draws = random.Random(0)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                for which in (1, 2, 0):
                    save(which)
        time.sleep(draws.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        load()
    save(0)
    print(load(), sorted(path.name for path in folder.iterdir()))
"""
MAPS = """
    config = lc.CacheConfig(6, 4, 2, 16, capacity=8, policy=lc.H2O(), rank=4)
    made = []
    for seed in range(3):
        maps = lc.FeatureMaps.initialise(
            config, hidden=64, generator=torch.Generator().manual_seed(seed)
        )
        made.append(lc.FeatureMaps(maps.layers, model_id=f"model-{seed}"))
    wanted = {maps.digest: maps.model_id for maps in made}

    def save(which):
        made[which].save_pretrained(folder)

    def load():
        found = lc.FeatureMaps.from_pretrained(folder)
        assert wanted[found.digest] == found.model_id
        return found.model_id
"""
CACHE = """
    model = build("gemma2")
    config, maps = less(model)
    handle = lc.attach(model, config, maps)
    made = []
    for length in (9, 10, 11):
        cache = handle.new_cache()
        with torch.no_grad():
            model(torch.arange(3, 3 + length).unsqueeze(0), past_key_values=cache)
        made.append(cache)

    def save(which):
        made[which].save(folder)

    def load():
        found = handle.load_cache(folder)
        seen = found.get_seq_length()
        assert found.state.length.tolist() == [seen]
        like = made[seen - 9]
        for i, layer in found.sliding_layers.items():
            assert torch.equal(layer.keys, like.layers[i].keys)
        return seen
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")
@pytest.mark.parametrize(
    ("imports", "setup", "told"),
    [
        ("", MAPS, "model-0 ['less_maps.safetensors']"),
        ("from tests.integrations.models import build, less", CACHE, "9 ['layers."),
    ],
    ids=["maps", "cache"],
)
def test_a_killed_save_leaves_one_whole_thing(tmp_path, imports, setup, told):
    """Killed at random moments: what is there then is one of the things saved, never a mixture."""
    pytest.importorskip("transformers")
    script = textwrap.dedent(KILLED).format(imports=imports, setup=textwrap.dedent(setup))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(told)
    for left in (".part", ".tmp"):
        assert left not in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as POSIX does")
def test_what_a_killed_save_of_a_cache_leaves_goes_with_the_next(tmp_path):
    """Killed while its second file, whose name is never drawn again, is half written."""
    saving = pytest.importorskip("less_cache.integrations.transformers.saving")
    layers = {"0.keys": torch.zeros(1)}

    class State:
        def __init__(self, value):
            self.value = value

        def save(self, path):
            write_tensors(path, {"a": torch.full((1,), self.value)}, {})

    def killed(path, tensors, header):
        with replaced(path) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        saving.write_tensors = killed
        saving.save_cache(tmp_path, State(1.0), layers, [1])
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir())
    saving.save_cache(tmp_path, State(2.0), layers, [1])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * 2


def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_permissions_that_new_files_have(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "text")
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127])
def test_names_may_be_as_long_as_the_system_takes(tmp_path, name):
    write_text(tmp_path / name, "text")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(os.name != "posix", reason="asks after processes as POSIX does")
def test_what_dead_processes_left_behind_goes_away(tmp_path):
    host = owner_tag().rpartition("-")[0]
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f".a[1].txt.{host}-{gone.pid}.0123abcd.part"
    alive = tmp_path / f".a[1].txt.{host}-{os.getpid()}.0123abcd.part"
    elsewhere = tmp_path / f".a[1].txt.other{host}-{gone.pid}.0123abcd.part"
    of_another = tmp_path / f".b.txt.{host}-{gone.pid}.0123abcd.part"
    for path in (alive, elsewhere, of_another):
        path.touch()
    dead.mkdir()
    (dead / ".tmp1234").touch()
    old_style = dead.with_suffix(".tmp")
    old_style.touch()
    write_text(tmp_path / "a[1].txt", "text")
    assert not dead.exists()
    assert not old_style.exists()
    assert alive.exists()
    assert elsewhere.exists()
    assert of_another.exists()


def test_an_error_leaves_nothing(tmp_path):
    def write_half():
        with replaced(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_infinity():
    data = {"a": math.inf, "b": [math.nan, 1.5], "c": (1, {"d": -math.inf})}
    assert json_text(data) == '{"a": null, "b": [null, 1.5], "c": [1, {"d": null}]}'


def test_equal_data_has_one_digest():
    data = {"a": [1.5, None], "b": "é"}
    assert json_digest(data) == json_digest({"a": (1.5, math.nan), "b": "é"})
    assert json_digest(data) != json_digest({"a": [1.5, 0], "b": "é"})
    assert json_digest([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
