"""The whole way, on a tiny model: what comes out fits the bytes, loads, and is found again."""

import dataclasses
import json
import sys

import pytest

import less_cache as lc

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from less_cache.tuning import Effort, measure_layers, save_report
from less_cache.tuning.candidates import equal_slots, simple_caches
from tests.integrations.models import build
from tests.tuning.tiny import EFFORT, run, text


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    return run(out), out


def test_the_folder_is_a_cache_within_the_bytes(tuned):
    found, out = tuned
    recipe = lc.CacheRecipe.from_pretrained(out)
    assert recipe.digest == found.recipe.digest
    assert recipe.config.bytes_per_sequence("float16") <= found.report["budget"]["bytes"]
    model = build("llama")
    with lc.attach(model, out):
        model.generate(text(1)[:, :8], max_new_tokens=3, do_sample=False)


def test_what_is_taken_loses_least(tuned):
    found, _ = tuned
    losses = {entry["name"]: entry["loss"] for entry in found.report["verdicts"]}
    assert losses[found.report["taken"]] == min(losses.values())
    assert {"no state", "equal slots", "sinks", "H2O"} <= set(losses)
    for entry in found.report["verdicts"]:
        assert entry["nbytes"] <= found.report["budget"]["bytes"]


def test_resumed_it_finds_the_same(tuned, tmp_path):
    found, out = tuned
    # As after a kill: what was measured is there, and the last stages are not.
    (out / "less_cache.safetensors").unlink()
    for verdict in (out / "work" / "verdicts").glob("*.json"):
        verdict.unlink()
    again = run(out)
    assert again.recipe.digest == found.recipe.digest
    assert again.report["verdicts"] == found.report["verdicts"]
    with pytest.raises(ValueError, match="holds a run with other settings: effort"):
        run(out, effort=Effort(calibration=5, measuring=2, fitting=9, validation=2))


def test_budgets_share_what_heads_lose(tuned, tmp_path):
    _, out = tuned
    before = {p.name: p.stat().st_mtime_ns for p in (out / "work" / "losses").iterdir()}
    found = run(tmp_path / "less", budget="45%", work=out / "work")
    assert found.recipe.config.bytes_per_sequence("float16") <= found.report["budget"]["bytes"]
    assert before == {p.name: p.stat().st_mtime_ns for p in (out / "work" / "losses").iterdir()}


def test_layers_may_be_measured_apart(tuned, tmp_path):
    found, _ = tuned
    given = {"effort": EFFORT, "policies": [lc.SinkWindow(1)], "ranks": [1], "progress": False}
    work = tmp_path / "work"
    assert measure_layers(build("llama"), text(), work, [1], **given) == [0]
    kept = (work / "losses" / "001.json").stat().st_mtime_ns
    assert measure_layers(build("llama"), text(), work, [0, 1], **given) == []
    again = run(tmp_path / "out", work=work)
    assert again.recipe.digest == found.recipe.digest
    assert (work / "losses" / "001.json").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="layers: got 2"):
        measure_layers(build("llama"), text(), work, [2], **given)


def test_machines_that_begin_together_take_the_effort_of_the_first(tmp_path, monkeypatch):
    chosen = []

    def slower(*_):
        chosen.append(dataclasses.replace(EFFORT, fitting=5))
        (tmp_path / "effort.json").write_text(json.dumps(EFFORT.to_dict()))
        return chosen[-1]

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules[measure_layers.__module__], "effort_within", slower)
    measure_layers(build("llama"), text(), tmp_path, [1], minutes=1, progress=False)
    assert len(chosen) == 1
    assert json.loads((tmp_path / "effort.json").read_text()) == EFFORT.to_dict()
    assert json.loads((tmp_path / "run.json").read_text())["effort"]["fitting"] == EFFORT.fitting


def test_more_steps_of_distillation_measure_nothing_anew(tuned):
    _, out = tuned
    before = {p.name: p.stat().st_mtime_ns for p in (out / "work" / "losses").iterdir()}
    found = run(out, effort=dataclasses.replace(EFFORT, steps=3))
    assert "trained together" in {entry["name"] for entry in found.report["verdicts"]}
    assert before == {p.name: p.stat().st_mtime_ns for p in (out / "work" / "losses").iterdir()}


def test_the_report_tells_it(tuned):
    found, out = tuned
    written = save_report(found.report, out)
    assert {path.name for path in written} == {
        "report.json",
        "heads.png",
        "curve.png",
        "index.html",
    }
    assert json.loads((out / "report.json").read_text())["taken"] == found.report["taken"]
    page = (out / "index.html").read_text()
    assert found.report["taken"] in page
    assert "$" not in page.replace("${", "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policies": []}, "policies: got none"),
        ({"policies": [lc.FullCache()]}, "policies: got .*expected policies that evict"),
        ({"ranks": [0]}, "ranks"),
        ({"minutes": 3}, "minutes: given, and effort too"),
        ({"budget": "120%"}, "budget: got '120%'"),
        ({"budget": 100}, "budget: got 100, 100 bytes, expected at least"),
    ],
)
def test_bad_input_is_told(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        run(tmp_path, **changes)
    assert not (tmp_path / "less_cache.safetensors").exists()


def test_simple_caches_spend_the_bytes_and_no_more():
    config = lc.CacheConfig(2, 4, 2, 16, capacity=8, policy=lc.SinkWindow(), rank=0)
    for total in (3000, 20000):
        found = simple_caches(config, total)
        assert found
        for own in found:
            assert own.config.bytes_per_sequence("float16") <= total
            more = own.config.replace(capacity=own.config.capacity + 1)
            assert more.bytes_per_sequence("float16") > total
    assert simple_caches(config, 200) == []
    assert equal_slots(config, 3000) == config.replace(capacity=equal_slots(config, 3000)).capacity
