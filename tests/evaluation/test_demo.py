"""The demo: what it compares, how it picks what it shows, and its page."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import less_cache as lc
from less_cache import cli, reference_model
from less_cache.cli.demo import demo_table
from less_cache.evaluation import demo, demo_speed
from less_cache.evaluation.comparison import FULL
from less_cache.evaluation.demo import ALONE, LESS, Continuation, Demo, Line
from less_cache.evaluation.demo_page import write_demo
from less_cache.evaluation.demo_speed import Speed, measure_speed
from less_cache.evaluation.perplexity import Contestant, Recovery
from less_cache.integrations.introspection import description
from less_cache.recipe import CacheRecipe

AROUND = {
    "command": "less-cache demo",
    "date": "2026-01-02 03:04 UTC",
    "machine": {"cpu": "a <fast> one", "cores": 2, "system": "Linux", "threads": 2},
    "versions": {"torch": "9.9", "python": "3.11"},
}


def recipe_for(model_config) -> CacheRecipe:
    """A cache whose layers differ in everything: slots, codes, rank and policy."""
    codes = [lc.Quantization(4, 3), None, lc.Quantization(2, 2), lc.Quantization(3, 3)]
    config = lc.CacheConfig.from_model(
        model_config,
        capacity=[[24, 40, 32, 28], 36, 60, 50, 44, [30, 20, 50, 40]],
        policy=[lc.H2O()] * 3 + [lc.DecayedH2O(factor=0.99)] * 3,
        rank=[0, 4, 0, 0, 0, 0],
        hidden=8,
        dtype="float16",
        quantization=[*codes, codes[0], codes[0]],
    )
    maps = lc.FeatureMaps.initialise(config, hidden=8)
    return CacheRecipe(config, maps, model=description(model_config))


@pytest.fixture(scope="module")
def model():
    return reference_model.load()[0]


def test_the_command_writes_a_page_from_the_folders_that_ship(model, tmp_path, monkeypatch):
    small = {"WINDOWS": 1, "PROMPTS": 2, "NEW_TOKENS": 4, "CONTEXT": 80, "BATCH": 2}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo_speed, "ROUNDS", 1)
    monkeypatch.setattr(demo_speed, "STEPS", 2)
    # As if the model read no more at once: pages tell the same of short windows.
    short, tokenizer = reference_model.load()
    short.config.max_position_embeddings = 160
    monkeypatch.setattr(reference_model, "load", lambda: (short, tokenizer))
    monkeypatch.setattr(reference_model, "TUNED", tmp_path / "tuned")
    recipe = recipe_for(short.config)
    for budget in demo.BUDGETS:
        recipe.save_pretrained(tmp_path / "tuned" / budget[:-1])
    out = tmp_path / "report"
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names = [FULL, ALONE, LESS, "tuned, 5 %", "tuned, 1.25 %"]
    data = json.loads((out / "demo.json").read_text())
    assert [cache["name"] for cache in data["caches"]] == names
    assert [cache["name"] for cache in data["caches"] if cache["recovery"] is None][:2] == names[:2]
    full, alone, less, *tuned = data["caches"]
    assert full["accepted"] == [4, 4]
    assert full["nbytes"] == 6 * 4 * 160 * 64 * 2 * 2
    assert alone["nbytes"] >= less["nbytes"]
    assert [cache["nbytes"] for cache in tuned] == [recipe.bytes_per_sequence] * 2
    assert tuned[0]["perplexity"] == tuned[1]["perplexity"]
    assert full["perplexity"] < tuned[0]["perplexity"]
    page = (out / "index.html").read_text()
    assert "$" not in page
    assert all(name in page and name in result.output for name in names)


def test_h2o_alone_has_the_bytes_of_the_papers_cache(model):
    recipe = recipe_for(model.config)
    full, alone, less, tuned = demo.contestants_of(model, {"7%": recipe})
    assert full.config is None
    assert (less.config.capacity, less.config.rank, alone.config.rank) == (52, 8, 0)
    extra = alone.config.bytes_per_sequence("float16") - less.config.bytes_per_sequence("float16")
    assert 0 <= extra < 6 * 4 * alone.config.with_dtype("float16").layer(0).slot_bytes
    assert tuned.name == "tuned, 7 %"
    assert tuned.config.dtype == "float32"
    assert tuned.maps is recipe.maps
    other = CacheRecipe(recipe.config, recipe.maps, model={**recipe.model, "num_layers": 7})
    with pytest.raises(ValueError, match="num_layers"):
        demo.contestants_of(model, {"7%": other})


def test_the_shown_prompt_is_the_median_one():
    assert demo.median_place([5, 1, 3]) == 2
    assert demo.median_place([40, 0, 20, 30]) == 2


def test_the_interval_is_that_of_a_mean():
    assert demo.mean_interval(torch.full((5,), 7)) == (7.0, 7.0)
    few, many = torch.tensor([0, 10] * 4), torch.tensor([0, 10] * 100)
    (low, high), (lower, higher) = demo.mean_interval(many), demo.mean_interval(few)
    assert lower < low < 5 < high < higher
    # Of a mean of 200 values whose deviation is 5: 1.96 * 5 / sqrt(200).
    assert high - low == pytest.approx(2 * 1.96 * 5 / 200**0.5, rel=0.15)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def test_every_cache_is_timed_and_the_model_left_as_it_was(tiny, monkeypatch):
    seen = []
    config = lc.CacheConfig.from_model(tiny.config, capacity=6, policy=lc.H2O(), rank=0)
    forward = tiny.forward
    ids = torch.arange(20)[None]

    def watched(ids, **arguments):
        cache = arguments.get("past_key_values")
        seen.append((type(cache).__name__, tuple(ids.shape)))
        return forward(ids, **arguments)

    monkeypatch.setattr(tiny, "forward", watched)
    speeds = measure_speed(tiny, [Contestant("full"), Contestant("small", config)], ids, batch=3)
    assert all(s.prompt_seconds > 0 and s.tokens_per_second > 0 for s in speeds)
    turns = demo_speed.ROUNDS * (1 + demo_speed.STEPS)
    assert seen.count(("DynamicCache", (1, 20))) == seen.count(("LessCache", (1, 20))) == 1
    assert seen.count(("StaticCache", (3, 1))) == seen.count(("LessCache", (3, 1))) == turns
    lc.attach(tiny, config).detach()


@torch.no_grad()
def test_the_full_caches_copies_go_on_as_it_would(tiny):
    ids = torch.arange(20)[None]
    cache = DynamicCache()
    tiny(ids, past_key_values=cache)
    static = demo_speed._static(tiny, cache, 2, 3)
    other = DynamicCache()
    tiny(ids, past_key_values=other)
    for token in (3, 1, 2):
        found = tiny(torch.full((2, 1), token), past_key_values=static).logits
        wanted = tiny(torch.full((1, 1), token), past_key_values=other).logits
        torch.testing.assert_close(found, wanted.expand(2, -1, -1))


def shown_demo() -> Demo:
    names = [FULL, ALONE, LESS, "tuned, 5 %", "tuned, 1.25 %"]
    recoveries = [None, None, Recovery(0.2, 0.1, 0.3), Recovery(0.9, 0.8, 1.0), None]
    counts = [4, 0, 1, 3, 2]
    lines = [
        Line(
            name=name,
            slots="12",
            nbytes=1024 * (9 - i),
            share=0.0125 * (9 - i),
            perplexity=10.0 + i,
            recovery=regained,
            accepted=[count, count],
            low=count - 0.5,
            high=count + 0.5,
            positions=[1.0, 2.0],
            losses=[2.0 + i, 3.0],
            speed=Speed(1.5 + i, 100.0 * (i + 1)),
        )
        for i, (name, regained, count) in enumerate(zip(names, recoveries, counts, strict=True))
    ]
    words = ["if a < b:"[: 2 * count] for count in counts]
    shown = Continuation(
        document="some.py",
        prompt="x = '<p>'",
        accepted=dict(zip(names, counts, strict=True)),
        kept=dict(zip(names, words, strict=True)),
        changed=dict.fromkeys(names, " other & so on"),
    )
    config = lc.CacheConfig(
        2, 2, 2, 4, [[7, 113], 1029], [lc.H2O(), lc.TOVA()], rank=[0, 4],
        quantization=[lc.Quantization(4, 3), None],
    )  # fmt: skip
    facts = {
        "window": 1024,
        "windows": 3,
        "tokens_scored": 3069,
        "prompts": 2,
        "prompt_tokens": 1020,
        "new_tokens": 4,
        "speed_context": 4096,
        "speed_batch": 8,
        **AROUND,
    }
    return Demo(lines, shown, config, facts)


def test_the_page_tells_what_was_found(tmp_path):
    page = write_demo(shown_demo(), tmp_path).read_text()
    for told in (
        "3.0 <small>(2.5 to 3.5)</small>",
        "90% (80% to 100%)",
        "<small>&times; 4.0</small>",
        "<mark>if a &lt;</mark><s> other &amp; so on</s>",
        "3 of 4 tokens the same",
        "x = &#x27;&lt;p&gt;&#x27;",
        "a &lt;fast&gt; one",
        "2026-01-02 03:04 UTC",
        "less-cache demo",
        "some.py",
        "of the 2 prompts",
    ):
        assert told in page, told
    for slots in (7, 113, 1029):
        assert f">{slots}</td>" in page
    for told in ("in 4 and 3 bits", "as they are", "H2O", "TOVA", "rank 4"):
        assert told in page
    assert page.index("rank 4") > page.index(">1029</td>") > page.index(">113</td>")
    data = json.loads((tmp_path / "demo.json").read_text())
    assert [cache["mean_accepted"] for cache in data["caches"]] == [4, 0, 1, 3, 2]
    assert lc.CacheConfig.from_dict(data["tuned"]) == shown_demo().tuned


def test_the_page_is_about_the_first_tuned_cache(tmp_path):
    own = shown_demo()
    lines = [*own.lines[:3], *own.lines[:2:-1]]
    first = write_demo(own, tmp_path / "a").read_text()
    second = write_demo(dataclasses.replace(own, lines=lines), tmp_path / "b").read_text()
    assert "perplexity 13.00, full cache 10.00" in first
    assert "perplexity 14.00, full cache 10.00" in second


def test_the_terminals_table_fits_into_80_columns():
    own = shown_demo()
    wide = {"nbytes": 6_291_456, "perplexity": 1234.56, "accepted": [64], "low": 57.7, "high": 64.0}
    lines = [dataclasses.replace(line, **wide) for line in own.lines]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo_table(dataclasses.replace(own, lines=lines)))
    text = console.export_text()
    assert "(57.7 to 64.0)" in text
    assert "tuned, 1.25 %" in text
