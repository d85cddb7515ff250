"""``less-cache reproduce`` end to end, on the shipped model and tiny data."""

import importlib.util
import json
import os

import pytest
from typer.testing import CliRunner

from less_cache import Quantization, cli, reference_model
from less_cache.cli.reproduce import maps_by_share, parse_share
from less_cache.evaluation import reproduce as work
from less_cache.evaluation.paper import EXTRA_TOKENS, TABLES, cache_for

os.environ.setdefault("HF_HUB_OFFLINE", "1")
H2O_MAPS = "h2o=less_cache/reference_model/maps/h2o-5/end-to-end"


def has(name):
    return importlib.util.find_spec(name) is not None


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(reference_model.held_out_documents()[3].text[:500])
    return str(path)


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    code = reference_model.held_out_documents()[3].text
    rows = [{"article": code[i : i + 500], "highlights": code[i : i + 60]} for i in (0, 700, 2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.parametrize("table", ["wikitext", "pg19"])
def test_tables_of_perplexity(table, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    policies = ["h2o", "lambda"] if table == "wikitext" else ["lambda"]
    given = [word for policy in policies for word in ("--policy", policy)]
    result = run("--table", table, "--data", text, "--out", tmp_path, "--share", "2%", *given)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "table.json").read_text())
    assert [(x["policy"], x["cache"]) for x in told["lines"]] == [
        ("", "full cache"),
        *((p, c) for p in policies for c in ("policy alone", "Baseline+", "LESS")),
    ]
    values = [line["values"]["token perplexity"] for line in told["lines"]]
    assert values[0] < values[-1] < values[-3]
    assert told["documents"] == 1
    assert told["lines"][1]["slots"] == 21
    assert told["versions"]["torch"]
    page = (tmp_path / "table.md").read_text()
    if table == "wikitext":
        # H2O at 2 %, and the full cache.
        assert "13.333 (Llama 2 7B)" in page
        assert "8.791 (Llama 2 7B)" in result.output
    assert page.count("\n|") >= 2 + len(values)


@pytest.mark.skipif(not has("rouge_score"), reason="needs less_cache[paper]")
@pytest.mark.parametrize("table", ["cnn", "xsum", "multinews"])
def test_tables_of_summaries(table, articles, tmp_path):
    arguments = ["--table", table, "--data", articles, "--out", tmp_path, "--shots", "1"]
    arguments += ["--new-tokens", "24", "--share", "10%", "--policy", "h2o", "--batch", "2"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "table.json").read_text())
    assert told["articles"] == 2
    assert len(told["lines"]) == 4
    for line in told["lines"]:
        assert [*line["values"]] == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
        assert 0 <= line["values"]["ROUGE-L"] <= line["values"]["ROUGE-1"] <= 100
    if table == "cnn":
        assert told["lines"][3]["published"] == ["Falcon 7B", 23.22]


@pytest.mark.skipif(not has("lm_eval"), reason="needs less_cache[lm-eval]")
def test_the_table_of_lm_eval(tmp_path):
    arguments = ["--table", "lm-eval", "--tasks", "less_cache_choices,less_cache_last", "--out"]
    arguments += [tmp_path, "--include-path", "tests/integrations/lm_eval_tasks", "--share", "2%"]
    result = run(*arguments, "--limit", "2", "--maps", H2O_MAPS, "--batch", "4")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "table.json").read_text())
    assert len(told["lines"]) == 1 + 3 + 2
    assert {"less_cache_choices acc", "less_cache_last perplexity"} <= set(
        told["lines"][0]["values"]
    )
    perplexities = [line["values"]["less_cache_last perplexity"] for line in told["lines"]]
    assert len(set(perplexities)) == 6


@pytest.mark.parametrize("policy", ["h2o", "lambda"])
def test_coded_slots_have_the_bytes_of_baseline_plus(policy, text, tmp_path):
    arguments = ["--table", "c4", "--data", text, "--out", tmp_path, "--policy", policy]
    result = run(*arguments, "--share", "2%", "--share", "5%", "--bits", "3")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "table.json").read_text())
    names = ["policy alone", "Baseline+", "3-bit slots", "LESS"]
    assert [line["cache"] for line in told["lines"]] == ["full cache", *names, *names]
    assert "3 bits" in told["codes"]
    model, _ = reference_model.load()
    found = work.contestants_of(model, work.Protocol(policies=(policy,)), {}, Quantization(3, 3))
    for _, share, contestant in found:
        if contestant.name == "3-bit slots":
            plus = cache_for(model.config, policy, share, extra=EXTRA_TOKENS)
            spent = contestant.config.bytes_per_sequence("float16")
            left = plus.bytes_per_sequence("float16") - spent
            assert 0 <= left < sum(x.kv_heads * x.slot_bytes for x in contestant.config.layers)
            # The policy is the paper's: half of the slots for heavy hitters, or so many sinks.
            rule, slots = contestant.config.policies[0], contestant.config.capacity
            wanted = (slots - 1) // 2 if policy == "h2o" else 0
            assert (rule.recent or 0) == wanted
    values = {line["cache"]: line["values"]["token perplexity"] for line in told["lines"][:4]}
    assert values["3-bit slots"] < values["Baseline+"]


def test_a_stopped_run_goes_on_where_it_stopped(text, tmp_path, monkeypatch):
    arguments = ["--table", "c4", "--data", text, "--out", tmp_path, "--share", "2%"]
    arguments += ["--policy", "lambda"]
    measured = []
    score = work.score_words

    def until_the_third(model, documents, told, **settings):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(told.name)
        return score(model, documents, told, **settings)

    monkeypatch.setattr(work, "score_words", until_the_third)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "The same command goes on" in result.output
    assert not (tmp_path / "table.json").exists()
    first = [*measured]
    measured.clear()
    monkeypatch.setattr(
        work, "score_words", lambda m, d, t, **s: measured.append(t.name) or score(m, d, t, **s)
    )
    assert run(*arguments).exit_code == 0
    assert first == ["full cache", "lambda 0.02 policy alone"]
    assert measured == ["lambda 0.02 Baseline+", "lambda 0.02 LESS"]
    with pytest.raises(ValueError, match="holds a run with other settings: length: None there"):
        run(*arguments, "--length", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table", "other"), "table: got 'other'"),
        (("--table", "c4", "--policy", "tova"), "policy: got 'tova'"),
        (("--table", "c4", "--share", "none"), "share: got 'none'"),
        (("--table", "c4", "--share", "200%"), "share: got '200%'"),
        (("--table", "c4", "--maps", "x"), "maps: got 'x', expected h2o=FOLDER"),
        (("--table", "c4", "--maps", H2O_MAPS, "--maps", H2O_MAPS), "came before"),
        (("--table", "c4", "--data", "nowhere"), "no file or folder"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_model, "load", lambda **_: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(has("rouge_score"), reason="rouge-score is here")
def test_without_rouge_its_extra_is_named(articles, tmp_path):
    with pytest.raises(ImportError, match=r"install less_cache\[paper\]"):
        run("--table", "cnn", "--data", articles, "--out", tmp_path)


def test_prompts_without_room_are_told(articles, tmp_path):
    loaded = reference_model.load()
    protocol = work.Protocol(length=64)
    data = [type("Prompt", (), {"prompt": "word " * 50, "summary": "word"})()]
    with pytest.raises(ValueError, match="no prompt has room for 128 more of 64 tokens"):
        work.reproduce(*loaded, TABLES["cnn"], data, protocol, {}, tmp_path, named="x")


def test_maps_of_one_share_go_before_those_of_all():
    maps = maps_by_share([H2O_MAPS, H2O_MAPS.replace("=", ":10%=", 1)])
    assert [*maps] == [("h2o", None), ("h2o", 0.1)]
    assert parse_share("5%") == parse_share("0.05") == 0.05
