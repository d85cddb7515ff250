"""``less-cache longrange`` end to end, on the shipped model and short texts."""

import json

import pytest
from typer.testing import CliRunner

from less_cache import cli, reference_model
from less_cache.evaluation import long_range

MAPS = "less_cache/reference_model/maps/h2o-5/end-to-end"
SMALL = ["--lengths", "90,100", "--depths", "0,1", "--samples", "1", "--capacity", "32"]
SMALL += ["--windows", "2", "--window", "128"]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["longrange", *map(str, arguments)], catch_exceptions=False)


def test_report_has_every_cache_task_length_and_depth(tmp_path):
    result = run(
        "--out", tmp_path, "--maps", MAPS, *SMALL, "--tasks", "passkey,text", "--seed", "2"
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "longrange.json").read_text())
    caches = ["full cache", "policy alone", "Baseline+", "LESS"]
    assert told["caches"] == caches
    assert len(told["cells"]) == 4 * 2 * 2
    means = {
        cache: [c["recalled"] for c in told["cells"] if c["cache"] == cache] for cache in caches
    }
    # What stands in front of the question is known to all, what is far to the full cache alone.
    assert all(sum(shares[1::2]) == 2 for shares in means.values())
    assert sum(means["full cache"]) > sum(means["policy alone"])
    assert [*told["text"]] == caches
    keys = [told["text"][cache]["key_nats"] for cache in caches]
    assert keys[0] < keys[3] < keys[1]
    low, high = told["text"]["LESS"]["key_nats_interval"]
    assert low <= keys[3] <= high
    mean = next(m for m in told["means"] if m["cache"] == "full cache")
    assert (mean["recalled"], mean["recalled_interval"]) == (1.0, None)  # of one seed
    assert told["versions"]["torch"]
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "key tokens" in page
    assert "$" not in page.replace("$0", "")
    assert "Written: " in result.output


def test_one_task_of_prose_without_maps(tmp_path):
    result = run(
        "--out", tmp_path, *SMALL, "--lengths", "130", "--tasks", "multikey", "--style", "prose"
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "longrange.json").read_text())
    assert told["caches"] == ["full cache", "policy alone"]
    assert told["text"] == {}
    assert "key tokens" not in (tmp_path / "index.html").read_text()


def test_text_alone_of_coded_slots_has_no_picture(tmp_path):
    bits = ("--key-bits", "4", "--value-bits", "3")
    result = run("--out", tmp_path, *SMALL, "--tasks", "text", "--policy", "sinkwindow", *bits)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "longrange.json").read_text())
    assert told["text"].keys() == {"full cache", "policy alone", "slots of 4 and 3 bits"}
    assert not (tmp_path / "depth.png").exists()
    assert "<img" not in (tmp_path / "index.html").read_text()


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    arguments = ["--out", tmp_path, *SMALL, "--tasks", "passkey", "--policy", "sinkwindow"]
    asked = []
    recall = long_range.recall

    def until_the_third(model, tokenizer, examples, contestant, **settings):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(contestant.name)
        return recall(model, tokenizer, examples, contestant, **settings)

    monkeypatch.setattr(long_range, "recall", until_the_third)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "The same command goes on" in result.output
    assert not (tmp_path / "longrange.json").exists()
    asked.clear()
    monkeypatch.setattr(
        long_range,
        "recall",
        lambda m, t, e, c, **s: asked.append(c.name) or recall(m, t, e, c, **s),
    )
    assert run(*arguments).exit_code == 0
    assert asked == ["full cache"] + 4 * ["policy alone"]
    with pytest.raises(ValueError, match="holds a run with other settings: seed: 0 there, 1 now"):
        run(*arguments, "--seed", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "other"), "tasks: got 'other', expected some of passkey"),
        (("--tasks", ","), "tasks: got ','"),
        (("--depths", "0,2"), "depths: got '0,2'"),
        (("--depths", "far"), "depths: got 'far'"),
        (("--lengths", "-3"), "lengths: got '-3'"),
        (("--style", "verse"), "style: got 'verse'"),
        (("--policy", "none"), "policy: got 'none'"),
        (("--data", "nowhere"), "no file or folder"),
        (("--filler", "nowhere"), "no file or folder"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_model, "load", lambda **_: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lengths_that_fit_nothing_are_told(tmp_path):
    small = ["--samples", "1", "--capacity", "16", "--out", tmp_path]
    with pytest.raises(ValueError, match="length: got 30, but what variables hides"):
        run("--lengths", "30", "--tasks", "variables", *small)
    small[3] = "64"
    with pytest.raises(ValueError, match="nothing would be evicted"):
        run("--lengths", "30", "--tasks", "passkey", *small)
