"""Command lines of anything: a line and a status for what is wrong, no traceback, no file.

The work itself is left out: whoever gets as far as that has been taken for right.
"""

import contextlib
import functools
import io
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model

pytest.importorskip("transformers")

from tests.helpers import random_maps, small_config
from tests.quantization.fitted import fitted

from .rule import files_below

EXAMPLES = 40


class Reached(BaseException):
    """All checks have passed."""


def reached(*arguments, **keywords):
    raise Reached


WORK = (
    "less_cache.training.calibrate",
    "less_cache.training.train",
    "less_cache.training.distill",
    "less_cache.evaluation.comparison.compare",
    "less_cache.evaluation.bench.FeatureMaps.initialise",
    "less_cache.evaluation.bench._take_turns",
)


shipped = functools.cache(reference_model.load)


def load(**_):
    """The shipped model, read once."""
    return shipped()


def run(*arguments):
    """Status (``None``: the work was reached), output and error output, as a shell would see it."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, reached))
        stack.enter_context(mock.patch("less_cache.reference_model.load", load))
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        stack.enter_context(mock.patch.object(sys, "argv", ["less-cache", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        try:
            cli.main()
            status = 0
        except Reached:
            status = None
        except SystemExit as ended:
            status = ended.code or 0
    return status, out.getvalue(), error.getvalue()


@functools.cache
def bases():
    """Transforms of another model than the shipped one."""
    return fitted(bases_config())


def bases_config():
    return small_config(rank=0, quantization=lc.Quantization(3, 3, "calibrated"))


@contextlib.contextmanager
def workplace():
    """A working folder with things in it that are not what they are taken for."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(reference_model.held_out_documents()[0].text[:20_000])
        (folder / "a-file").write_text("no folder")
        (folder / "deep.json").write_text("[" * 100_000)
        (folder / "object.json").write_text("{}")
        (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
        (folder / "ids.npy").mkdir()
        (folder / "empty").mkdir()
        random_maps(small_config()).save_pretrained(folder / "maps")
        (folder / "bases").mkdir()
        bases().save(folder / "bases" / "transforms.safetensors")
        whole = lc.CacheRecipe(bases_config(), None, bases(), model={"vocab_size": 7})
        whole.save_pretrained(folder / "whole")
        (folder / "half").mkdir()
        (folder / "half" / "less_maps.safetensors").write_bytes(b"x" * 99)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(home)


def check(arguments):
    """Run by the rule: 0 or reached; or 2, one line about it, and every file as it was."""
    # Its progress bar is none of the command's words.
    shipped()
    with workplace() as folder:
        before = files_below(folder)
        status, told, error = run(*arguments)
        assert "Traceback" not in told + error
        assert files_below(folder) == before, f"{status}: files have changed"
    if status not in (0, None):
        assert status == 2, (status, error)
        last = error.strip().splitlines()
        usage = "Usage:" in error
        lines = [line for line in last if not line.startswith("warning:")]
        assert usage or (len(lines) == 1 and lines[0].startswith("error: ")), error
        assert usage or len(lines[0]) > len("error: "), error
    return status, error


TEXTS = (
    *("", " ", "-", "--", "0", "-1", "-3", "1.5", "nan", "inf", "1e400", "100000000", "5%", "x"),
    *(
        "99999999999999999999999",
        "[/b]",
        "[bold]x",
        "[1, [2",
        "[[[1]]]",
        "[true]",
        "{}",
        "ñ",
        "...",
    ),
    *("a-file", "a-file/x", "deep.json", "object.json", "bytes.txt", "ids.npy", "empty", "half"),
    *(
        "maps",
        "whole",
        "nowhere",
        "a=nowhere",
        "=maps",
        "nobody/nothing-at-all",
        "datasets:",
        "banana",
    ),
    *("cuda:77", "cpu:9", "meta", "mps", "int8", "float16", "h2o:recent=x", "h2o:x=1", "fullcache"),
    *("2", "3", "hadamard", "calibrated", "bases", "bases/transforms.safetensors"),
    *("lru", "h2o:recent=nan", "scissorhands:window=63", "5:9", "3:1", ":", "a:b", "x" * 300),
)
COMMON = ("--model", "--capacity", "--policy", "--length", "--device", "--dtype", "--data", "--out")
BITS = ("--bits", "--key-bits", "--value-bits", "--transform")
CODES = (*BITS, "--transforms")
COMMANDS = {
    "calibrate": (
        ("--data", "text.txt", "--out", "out", "--length", "96"),
        (*("--model", "--length", "--device", "--dtype", "--data", "--out"), *BITS, "--sequences"),
    ),
    "train": (
        ("--data", "text.txt", "--out", "out", "--length", "96"),
        (
            *(*COMMON, "--rank", "--recipe", "--kind", "--hidden", "--epochs", "--rows", "--seed"),
            *("--learning-rate", "--patience", "--sequences", "--layers", "--batch", "--banana"),
            *CODES,
        ),
    ),
    "distill": (
        ("--data", "text.txt", "--maps", "maps", "--out", "out", "--length", "96"),
        (
            *(*COMMON, *CODES, "--maps", "--steps", "--batch", "--learning-rate", "--micro-batch"),
            "--seed",
        ),
    ),
    "eval": (
        ("--maps", "maps", "--data", "text.txt", "--length", "96"),
        (
            *COMMON,
            *CODES,
            *("--maps", "--cache", "--windows", "--prompts"),
            "--new-tokens",
            "--batch",
        ),
    ),
    "bench": (
        (),
        (
            *("--context", "--batch", "--query-heads", "--kv-heads", "--head-dim", "--capacity"),
            *(*BITS, "--cache"),
        ),
    ),
    "info": ((), ("--maps", "--transforms", "--cache")),
    "merge": (("empty", "--out", "out"), ("--out", "")),
}
"""By command: a call that is right as far as it goes, and the options that are spoilt."""


@pytest.mark.parametrize("command", COMMANDS)
@given(data=st.data())
def test_spoilt_options(command, data):
    good, options = COMMANDS[command]
    spoilt = data.draw(st.lists(st.sampled_from(options), min_size=1, max_size=2, unique=True))
    arguments = [command, *good]
    for option in spoilt:
        text = data.draw(st.sampled_from(TEXTS))
        arguments += [option, text] if option else [text]
    status, error = check(arguments)
    if status == 2 and "Usage:" not in error:
        # Told of a mistake: by the option's name, the text itself, or what takes part in it.
        assert ": " in error.removeprefix("error: ")


EACH = [
    ("train", "--device", "banana"),
    ("train", "--device", "cuda:77"),
    ("train", "--device", "cpu:9"),
    ("train", "--out", "a-file"),
    ("train", "--capacity", "[/b]"),
    ("train", "--data", ""),
    ("train", "--data", "ids.npy"),
    ("train", "--sequences", "0"),
    ("train", "--sequences", "-3"),
    ("train", "--rank", "100000000"),
    ("train", "--model", "a-file"),
    ("train", "--model", "nobody/nothing-at-all"),
    ("train", "--learning-rate", "nan"),
    ("train", "--policy", "lru"),
    ("distill", "--maps", "half"),
    ("eval", "--maps", "nowhere"),
    ("eval", "--cache", "whole"),
    ("eval", "--cache", "nobody/nothing-at-all"),
    ("eval", "--out", "a-file"),
    ("eval", "--bits", "5"),
    ("train", "--transforms", "bases"),
    ("calibrate", "--out", "a-file"),
    ("calibrate", "--key-bits", "3"),
    ("info", "--cache", "maps"),
    ("info", "--cache", "half"),
    ("info", "--cache", "reference:"),
    ("bench", "--cache", "bases"),
    ("bench", "--batch", "-1"),
    ("bench", "--capacity", "0"),
]


@pytest.mark.parametrize(("command", "option", "text"), EACH, ids=" ".join)
def test_mistakes_that_were_made(command, option, text):
    status, error = check([command, *COMMANDS[command][0], option, text])
    assert status == 2
    if option == "--capacity":
        assert text in error


@given(
    arguments=st.lists(
        st.one_of(st.sampled_from([*COMMANDS, *TEXTS]), st.text()), min_size=1, max_size=4
    )
)
def test_words_of_all_kinds(arguments):
    """As Typer's own runner sees them: no exception but an exit, or one that is told."""
    arguments = [word.replace("\0", "") for word in arguments]
    if "demo" in arguments:
        return
    check(arguments)


def test_the_runner_sees_usage_errors():
    for arguments in (["banana"], ["train"], ["train", "--banana", "1"], ["export", "x"]):
        assert CliRunner().invoke(cli.app, arguments).exit_code == 2
