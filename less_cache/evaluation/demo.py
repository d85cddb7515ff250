"""The main job on the shipped model: one held-out module continued under three caches."""

from __future__ import annotations

import base64
import html
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from .. import reference_model
from .._files import json_text, write_text
from ..config import CacheConfig
from ..policies import H2O
from ..reference_model.shipped_maps import shipped
from .comparison import BASELINE_PLUS, Comparison, compare, contestants_for
from .generation import accepted_prefix, continue_greedily
from .perplexity import Contestant, cut_windows
from .report import as_json, draw_positions, draw_recovery, gap_text

CAPACITY = 0.05
DOCUMENT, PROMPT_START, PROMPT_TOKENS = "zipfile.py", 5000, 640
NEW_TOKENS = 96
REPETITION_PENALTY = 1.15
WINDOWS = 24
LESS = "LESS"
PAGE = Path(__file__).parent / "demo.html"


@dataclass(frozen=True)
class Continuation:
    """What one cache made of the prompt.

    Parameters
    ----------
    name
        Of the cache.
    text
        The continuation.
    agreed
        How many of its first tokens are the full cache's.
    agreed_text
        Those tokens' text.
    tokens_per_second
        While continuing, the prompt included.
    bytes_per_sequence
        Of the cache at the end.
    """

    name: str
    text: str
    agreed: int
    agreed_text: str
    tokens_per_second: float
    bytes_per_sequence: int


@dataclass(frozen=True)
class Demo:
    """Everything the report shows."""

    document: str
    prompt: str
    continuations: list[Continuation]
    comparison: Comparison


def run_demo(*, progress: bool = True) -> Demo:
    """Load the shipped model, continue a held-out module, and compare the caches on others.

    Parameters
    ----------
    progress
        Show bars.
    """
    model, tokenizer = reference_model.load()
    maps = shipped("h2o", CAPACITY)
    config = CacheConfig.from_model(
        model.config, capacity=CAPACITY, policy=H2O(), rank=maps[0].rank, dtype=model.dtype
    )
    documents = [
        (d.name, torch.tensor(tokenizer(d.text)["input_ids"]))
        for d in reference_model.held_out_documents()
    ]
    length = model.config.max_position_embeddings
    windows = cut_windows(documents, length)
    # Spread over the documents, so that no single one decides.
    stride = max(1, len(windows) // WINDOWS)
    comparison = compare(
        model, windows[::stride][:WINDOWS], config, {LESS: maps}, progress=progress
    )
    prompt = dict(documents)[DOCUMENT][PROMPT_START : PROMPT_START + PROMPT_TOKENS]
    contestants = [
        c for c in contestants_for(config, {LESS: maps}, length) if c.name != BASELINE_PLUS
    ]
    continuations = _continue(model, tokenizer, prompt, contestants, comparison)
    return Demo(DOCUMENT, str(tokenizer.decode(prompt)), continuations, comparison)


def _continue(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    contestants: list[Contestant],
    comparison: Comparison,
) -> list[Continuation]:
    wanted: Tensor | None = None
    result = []
    for contestant in contestants:
        started = time.perf_counter()
        found = continue_greedily(
            model,
            prompt.unsqueeze(0),
            contestant,
            new_tokens=NEW_TOKENS,
            repetition_penalty=REPETITION_PENALTY,
        )
        seconds = time.perf_counter() - started
        wanted = found if wanted is None else wanted
        agreed = int(accepted_prefix(wanted, found)[0])
        used = comparison.row(contestant.name).bytes_per_sequence
        if contestant.config is None:
            used = used * (len(prompt) + NEW_TOKENS) // model.config.max_position_embeddings
        result.append(
            Continuation(
                contestant.name,
                tokenizer.decode(found[0]),
                agreed,
                tokenizer.decode(found[0, :agreed]),
                NEW_TOKENS / seconds,
                used,
            )
        )
    return result


def write_demo(demo: Demo, folder: Path) -> Path:
    """Write ``index.html``, with its pictures inside, and ``demo.json``; the page's path."""
    rows = []
    for row in demo.comparison.rows:
        cells = [
            html.escape(row.name),
            row.slots,
            f"{row.bytes_per_sequence / 1024:,.0f} KiB",
            f"{row.perplexity:.2f}",
            f"{row.second_half:.2f}",
            gap_text(row) or "&ndash;",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    columns = []
    for item in demo.continuations:
        rest = item.text[len(item.agreed_text) :]
        columns.append(
            f"<section><h3>{html.escape(item.name)}</h3>"
            f"<p class=facts>{item.bytes_per_sequence / 1024:,.0f} KiB of cache &middot; "
            f"{item.tokens_per_second:,.0f} tokens/s &middot; "
            f"first {item.agreed} of {NEW_TOKENS} tokens as under the full cache</p>"
            f"<pre><mark>{html.escape(item.agreed_text)}</mark>{html.escape(rest)}</pre></section>"
        )
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        document=html.escape(demo.document),
        prompt=html.escape("\n".join(demo.prompt.splitlines()[-14:])),
        first=PROMPT_START,
        last=PROMPT_START + PROMPT_TOKENS,
        slots=demo.comparison.row(LESS).slots,
        window=demo.comparison.facts["window"],
        windows=demo.comparison.facts["windows"],
        tokens=f"{demo.comparison.facts['tokens_scored']:,}",
        rows="\n".join(rows),
        columns="\n".join(columns),
        positions=_inline(draw_positions(demo.comparison, "Where the small cache hurts")),
        recovery=_inline(draw_recovery(demo.comparison, "How much of the loss is won back")),
        versions=html.escape(json.dumps(demo.comparison.facts["versions"])),
    )
    path = folder / "index.html"
    write_text(path, page)
    data = {
        **as_json(demo.comparison),
        "document": demo.document,
        "continuations": [vars(item) for item in demo.continuations],
    }
    write_text(folder / "demo.json", json_text(data, indent=2) + "\n")
    return path


def _inline(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
