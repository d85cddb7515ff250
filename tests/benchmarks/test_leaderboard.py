"""Any cache is measured alike, peers stay in their bytes, and the page tells it."""

import ast
import contextlib
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("psutil")

from transformers import DynamicCache

import less_cache as lc
from benchmarks import leaderboard
from benchmarks.leaderboard import page
from benchmarks.leaderboard.continuing import Entrant, cache_bytes, measure
from benchmarks.leaderboard.ours import FULL, TUNED
from benchmarks.leaderboard.peers import HEADS, PAIR_BYTES, entries
from benchmarks.leaderboard.protocol import Plan, Results
from tests.integrations.models import build

PROMPT, LENGTH, NEW = 12, 20, 5


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 60, (3, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def measured(model, windows, empty, nbytes=cache_bytes, **settings):
    entrant = Entrant("x", "5", lambda: contextlib.nullcontext(empty), nbytes, True, **settings)
    return measure(model, windows, entrant, prompt=PROMPT, new_tokens=NEW, batch=2)


def test_a_growing_cache_is_the_model_itself(model, windows):
    found = measured(model, windows, DynamicCache)
    ids = torch.tensor(windows)
    with torch.no_grad():
        logits = model(ids).logits[:, PROMPT - 1 : -1].log_softmax(2)
        wanted = -logits.gather(2, ids[:, PROMPT:, None]).squeeze(2)
        whole = model.generate(
            ids[:, :PROMPT], do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0
        )
    torch.testing.assert_close(torch.tensor(found["losses"]), wanted, atol=1e-4, rtol=1e-4)
    assert found["greedy"] == whole[:, PROMPT:].tolist()
    shapes = model.config
    heads = shapes.num_hidden_layers * shapes.num_key_value_heads
    assert found["bytes"] == LENGTH * heads * 2 * shapes.head_dim * 2
    assert found["prompt_seconds"] > 0
    assert found["step_seconds"] > 0
    again = measured(model, windows, DynamicCache, copies=False)
    assert (again["losses"], again["greedy"]) == (found["losses"], found["greedy"])


def test_a_small_cache_decodes_as_it_does(model, windows):
    config = lc.CacheConfig.from_model(model.config, capacity=6, policy=lc.H2O(), rank=0)
    with lc.attach(model, config) as handle:
        found = measured(model, windows, handle.new_cache, lambda *_: 1)
        cache = handle.new_cache()
        ids = torch.tensor(windows)
        with torch.no_grad():
            model(ids[:, :PROMPT], past_key_values=cache)
            logits = model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache).logits[:, -1]
    wanted = -logits.log_softmax(1).gather(1, ids[:, PROMPT + 1, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(found["losses"])[:, 1], wanted, atol=1e-4, rtol=1e-4)


def test_peers_stay_in_their_bytes_and_are_told_apart():
    budgets = {"5": 314_572, "2.5": 157_286, "1.25": 78_643}
    plan = Plan("model", ((1, 2),), 768, 64, 16, budgets)
    found = [*entries(plan)]
    assert len({(entry["name"], entry["share"]) for entry in found}) == len(found)
    for entry in found:
        if entry["share"] and "bits" not in entry:
            most = entry["pairs"] + entry.get("interval", 0)
            used = most * HEADS * PAIR_BYTES
            assert budgets[entry["share"]] - HEADS * PAIR_BYTES < used <= budgets[entry["share"]]
        # SnapKV refuses a window that is not shorter than the steps that it looks at.
        if "window_size" in entry.get("later", {}):
            assert 0 < entry["later"]["window_size"] < entry["interval"]
    json.dumps(found)


def test_what_runs_beside_the_peers_needs_no_less_cache():
    folder = Path(leaderboard.__file__).parent
    for name in ("__init__", "continuing", "kvpress_worker", "peers", "protocol"):
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(found.startswith(("less_cache", "ours", "page")) for found in named)


def test_a_result_is_kept_and_a_plan_read_again(tmp_path):
    plan = Plan("model", ((1, 2), (3, 4)), 1, 2, 3, {"5": 10})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    results = Results(tmp_path / "results")
    told = {"name": "a", "share": "5"}
    assert results.get(told, lambda: {"bytes": 1}) == {**told, "bytes": 1}
    assert Results(tmp_path / "results").get(told, lambda: 1 / 0)["bytes"] == 1
    assert results.of([{"name": "b"}, told]) == [{**told, "bytes": 1}]


def result(name, share, loss, greedy, **more):
    rest = {"bytes": 10, "grows": False, "prompt_seconds": 1.0, "step_seconds": 0.5, **more}
    return {"name": name, "share": share, "losses": loss, "greedy": greedy, **rest}


def test_the_page_has_the_best_first_beside_the_full_cache(tmp_path):
    results = [
        result(FULL, "", [[1.0, 1.0], [1.0, 1.0]], [[1, 2, 3], [4, 5, 6]], bytes=99, grows=True),
        result("kvpress X, once", "5", [[3.0, 1.0], [3.0, 1.0]], [[1, 2, 9], [9, 5, 6]]),
        result(TUNED, "5", [[1.0, 1.5], [1.0, 1.5]], [[1, 2, 3], [4, 5, 6]], step_seconds=1.0),
    ]
    rows = page.figures(results, ["a", "b"], [[True, False], [True, False]])
    full, peer, tuned = rows
    assert full["above_full"]["value"] == 0
    assert peer["perplexity"]["value"] == pytest.approx(math.e**2)
    assert peer["above_full"]["value"] == pytest.approx(math.e**2 - math.e)
    assert (peer["far_nats"]["value"], tuned["far_nats"]["value"]) == (3.0, 1.0)
    # Of the first text two tokens agree, of the second none: one that differs ends it.
    assert peer["agreement"] == {"value": 1.0, "low": 0.0, "high": 2.0}
    assert (tuned["agreement"]["value"], tuned["step_of_full"]) == (3.0, 2.0)
    facts = {
        "budgets": {"5": 10},
        "versions": {"torch": "1"},
        "peers_versions": {"kvpress": "2"},
        "machine": {"cpu": "c"},
        "windows": 2,
        "documents": 2,
        "far_tokens": 2,
        "date": "today",
        "command": "make it",
        "missing": ["kvpress Y, once 5"],
        "batch": 1,
    }
    text = page.between(f"a\n{page.BEGIN}\nold\n{page.END}\nb\n", page.text(rows, facts))
    assert "old" not in text
    assert text.index(f"**{TUNED}**") < text.index("kvpress X") < text.index(f"| {FULL}")
    assert "99, grows" in text
    assert "**Not measured yet**, by share: kvpress Y, once 5." in text
    page.draw(rows, tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lacks"):
        page.between("nothing", "x")
