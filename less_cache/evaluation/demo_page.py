"""The demo's report: one page with its pictures inside, and its numbers as JSON."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any

from .._files import json_text, write_text
from . import demo as run
from .comparison import BASELINE_PLUS, FULL
from .demo import LESS, Demo, TokenLoss
from .report import as_json, draw_positions, draw_recovery, gap_text

PAGE = Path(__file__).parent / "demo.html"
WON_MOST, LOST_MOST = 5, 3
"""Tokens in the table: where LESS wins back most, and where the policy loses most."""
DEEPEST = 4.0
"""Nats above the full cache from which on a token's colour is the strongest."""
LABELS = {"cpu": "processor", "cores": "cores", "system": "system", "threads": "torch threads"}


def write_demo(demo: Demo, folder: Path) -> Path:
    """Write ``index.html`` and ``demo.json`` into a folder; the page's path."""
    comparison = demo.comparison
    facts = comparison.facts
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        slots=comparison.row(LESS).slots,
        window=f"{facts['window']:,}",
        windows=facts["windows"],
        tokens=f"{facts['tokens_scored']:,}",
        won_most=WON_MOST,
        lost_most=LOST_MOST,
        prompts=min(run.PROMPTS, facts["windows"]),
        new_tokens=facts["new_tokens"],
        ahead=demo.ahead,
        baseline=BASELINE_PLUS,
        rows=_comparison_rows(demo),
        positions=_inline(draw_positions(comparison, "Where the small cache hurts")),
        recovery=_inline(draw_recovery(comparison, "How much of the loss is won back")),
        document=html.escape(demo.document),
        shown=len(demo.tokens),
        lost=_lost_rows(demo.tokens),
        policy_text=_coloured(demo.tokens, lambda token: token.policy),
        less_text=_coloured(demo.tokens, lambda token: token.less),
        policy_nats=_excess(demo.tokens, lambda token: token.policy),
        less_nats=_excess(demo.tokens, lambda token: token.less),
        context=f"{run.CONTEXT:,}",
        batch=run.BATCH,
        timings=_timing_rows(demo),
        around=_around_rows(demo.around),
    )
    path = folder / "index.html"
    write_text(path, page)
    data = {
        **as_json(comparison),
        **demo.around,
        "ahead": demo.ahead,
        "document": demo.document,
        "tokens": [vars(token) for token in demo.tokens],
        "timings": [vars(timing) for timing in demo.timings],
    }
    write_text(folder / "demo.json", json_text(data, indent=2) + "\n")
    return path


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _comparison_rows(demo: Demo) -> str:
    return "\n".join(
        _row(
            (
                html.escape(row.name),
                row.slots,
                f"{row.bytes_per_sequence / 1024:,.0f} KiB",
                f"{row.perplexity:.2f}",
                f"{row.second_half:.2f}",
                gap_text(row) or "&ndash;",
                "&ndash;" if row.accepted is None or row.name == FULL else f"{row.accepted:.1f}",
            )
        )
        for row in demo.comparison.rows
    )


def _lost_rows(tokens: list[TokenLoss]) -> str:
    """What LESS remembers best, and what the policy loses most on, whatever LESS makes of it."""

    def gain(loss: float, of: float) -> float:
        """In probability: a token that nobody foresees is no example, whatever its ratio."""
        return math.exp(-loss) - math.exp(-of)

    won = sorted(tokens, key=lambda t: gain(t.less, t.policy), reverse=True)[:WON_MOST]
    others = [token for token in tokens if token not in won]
    worst = sorted(others, key=lambda t: gain(t.full, t.policy), reverse=True)[:LOST_MOST]
    numbers = ((token, (token.full, token.policy, token.less)) for token in (*won, *worst))
    return "\n".join(
        _row(
            (
                f"<code>{html.escape(_visible(token.text))}</code>",
                *(f"{math.exp(-loss):.1%}" for loss in losses),
            )
        )
        for token, losses in numbers
    )


def _visible(text: str) -> str:
    return text.replace("\n", "\N{RETURN SYMBOL}").replace(" ", "\N{OPEN BOX}")


def _coloured(tokens: list[TokenLoss], loss: Callable[[TokenLoss], float]) -> str:
    """The text; the more a token loses against the full cache, the redder."""
    parts = []
    for token in tokens:
        depth = min(1.0, (loss(token) - token.full) / DEEPEST)
        text = html.escape(token.text)
        # Faint ones are noise.
        parts.append(text if depth < 0.1 else f'<i style="--depth:{depth:.2f}">{text}</i>')
    return "".join(parts)


def _excess(tokens: list[TokenLoss], loss: Callable[[TokenLoss], float]) -> str:
    mean = sum(loss(token) - token.full for token in tokens) / len(tokens)
    return f"{mean:.2f}"


def _timing_rows(demo: Demo) -> str:
    full = {t.device: t.milliseconds for t in demo.timings if t.cache == "full cache"}
    return "\n".join(
        _row(
            (
                html.escape(timing.cache),
                html.escape(timing.device),
                f"{timing.bytes_per_sequence / 1024:,.0f} KiB",
                f"{timing.milliseconds:.2f} ms",
                f"{full[timing.device] / timing.milliseconds:.1f} times",
            )
        )
        for timing in demo.timings
    )


def _around_rows(around: dict[str, Any]) -> str:
    told = {"command": around["command"], "date": around["date"]}
    told |= {label: around["machine"][name] for name, label in LABELS.items()}
    told |= around["versions"]
    return "\n".join(_row((html.escape(name), html.escape(str(x)))) for name, x in told.items())


def _inline(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
