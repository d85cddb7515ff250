"""Measure every cache that has no result yet, and write the page: `make leaderboard`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import less_cache as lc
from less_cache import reference_model
from less_cache._files import json_text, write_text
from less_cache.evaluation.long_text import key_tokens, read, short_context_nats
from less_cache.evaluation.perplexity import Contestant, Window, cut_windows, spread_over
from less_cache.evaluation.surroundings import surroundings
from less_cache.training.data import tokenize
from less_cache.tuning.budget import parse_budget

from . import page
from .ours import entries as our_entries
from .ours import measure_ours
from .peers import entries as peers_entries
from .protocol import SHARES, Plan, Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "leaderboard.md"
PEERS_PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"
SHORT = 128
"""Tokens of the short context that far tokens are told by."""


def windows_of(model: Any, tokenizer: Any, count: int) -> list[Window]:
    """So many windows of the held-out modules, spread over all."""
    documents = [(d.name, d.text) for d in reference_model.held_out_documents()]
    tokens = tokenize(documents, tokenizer, vocabulary=model.config.vocab_size)
    return spread_over(cut_windows(tokens, model.config.max_position_embeddings), count)


def far_tokens(model: Any, windows: list[Window], plan: Plan, kept: Path) -> list[list[bool]]:
    """Of each continuation, what the full cache foresees and a short context does not."""
    if not kept.exists():
        ids = [window.ids for window in windows]
        whole = read(model, ids, Contestant("full cache"))
        chosen = key_tokens(whole, short_context_nats(model, ids, SHORT))
        # The loss at place i is that of token i + 1.
        write_text(kept, json.dumps([own[plan.prompt - 1 :].tolist() for own in chosen]))
    return json.loads(kept.read_text(encoding="utf-8"))


def main(
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows, spread over all.")] = 12,
    prompt: Annotated[int, typer.Option(min=64, help="Tokens of a window's prompt.")] = 768,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of greedy continuations.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 12,
    only: Annotated[str, typer.Option(help="ours, peers or page: that part alone.")] = "",
    shares: Annotated[str, typer.Option(help="Of the full cache's bytes, in percent.")] = (
        ",".join(SHARES)
    ),
) -> None:
    """Measure every cache that has no result yet, and write the page."""
    torch.set_num_threads(1)
    model, tokenizer = reference_model.load()
    cut = windows_of(model, tokenizer, windows)
    shapes = lc.CacheConfig.from_model(
        model.config, capacity=64, policy=lc.H2O(), rank=0, dtype="float16"
    )
    length = len(cut[0].ids)
    plan = Plan(
        str(Path(reference_model.__file__).parent / "model"),
        tuple(tuple(window.ids.tolist()) for window in cut),
        prompt,
        new_tokens,
        batch,
        {share: parse_budget(f"{share}%", shapes, length) for share in shares.split(",")},
    )
    folder = ROOT / "build" / "leaderboard" / plan.digest
    plan.save(folder / "plan.json")
    far = far_tokens(model, cut, plan, folder / "far.json")
    results = Results(folder / "results")
    if only in ("", "ours"):
        measure_ours(model, plan, results)
    if only in ("", "peers"):
        worker = "benchmarks.leaderboard.kvpress_worker"
        command = [PEERS_PYTHON, "-m", worker, folder / "plan.json"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    if only in ("", "page"):
        told = [*(entry for entry, _ in our_entries(model, plan.budgets)), *peers_entries(plan)]
        found = results.of(told)
        missing = [one for one in told if not results.of([one])]
        rows = page.figures(found, [window.document for window in cut], far)
        around = surroundings()
        # The page written anew tells the command that measured.
        around["command"] = around["command"].replace(" --only page", "")
        facts = {
            **around,
            "windows": len(cut),
            "documents": len({window.document for window in cut}),
            "prompt": prompt,
            "continuation": length - prompt,
            "new_tokens": new_tokens,
            "batch": batch,
            "far_tokens": sum(map(sum, far)),
            "budgets": plan.budgets,
            "full_bytes": shapes.full_cache_bytes(length, "float16"),
            "peers_versions": next((r["versions"] for r in found if "versions" in r), {}),
        }
        facts["missing"] = [f"{one['name']} {one['share']}".strip() for one in missing]
        data = {**facts, "rows": rows}
        write_text(RESULTS / "leaderboard.json", json_text(data, indent=1) + "\n")
        page.draw(rows, RESULTS / "leaderboard.png")
        part = page.text(rows, facts)
        write_text(PAGE, page.between(PAGE.read_text(encoding="utf-8"), part))
        Console(width=200).print(part, markup=False)


if __name__ == "__main__":
    typer.run(main)
