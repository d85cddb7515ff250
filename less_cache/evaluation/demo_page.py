"""The demo's report: one page with its picture inside, and its numbers as JSON."""

from __future__ import annotations

import html
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._files import json_text, write_text
from ..config import CacheConfig
from ..provenance import codes_text
from .comparison import FULL
from .demo import ALONE, LESS, Demo, Line
from .pages import around_rows, as_png, cells, inline, page
from .perplexity import Recovery
from .report import COLOURS, blank_figure

PAGE = Path(__file__).parent / "demo.html"
STYLES = {ALONE: (COLOURS["bad"], "-"), LESS: (COLOURS["plus"], "-")}
"""Of lines in the picture; those of tuned caches are green."""


def write_demo(demo: Demo, folder: Path) -> Path:
    """Write ``index.html`` and ``demo.json`` into a folder; the page's path."""
    facts, full, best = demo.facts, demo.line(FULL), first_tuned(demo)
    text = page(
        PAGE,
        share=percent(best.share),
        headline_perplexity=f"{best.perplexity:.2f}",
        full_perplexity=f"{full.perplexity:.2f}",
        alone_perplexity=f"{demo.line(ALONE).perplexity:.2f}",
        accepted=f"{best.mean_accepted:.0f}",
        alone_accepted=f"{demo.line(ALONE).mean_accepted:.0f}",
        faster=times(best.speed.tokens_per_second / full.speed.tokens_per_second),
        window=f"{facts['window']:,}",
        windows=facts["windows"],
        tokens=f"{facts['tokens_scored']:,}",
        prompts=facts["prompts"],
        prompt_tokens=facts["prompt_tokens"],
        new_tokens=facts["new_tokens"],
        context=f"{facts['speed_context']:,}",
        batch=facts["speed_batch"],
        rows="\n".join(_line_row(line, full, facts["new_tokens"]) for line in demo.lines),
        positions=inline(as_png(draw_excess(demo))),
        first=html.escape(best.name),
        heads=_heads(demo.tuned),
        document=html.escape(demo.continuation.document),
        prompt=html.escape(demo.continuation.prompt),
        continuations=_continuations(demo),
        around=around_rows(facts),
    )
    path = folder / "index.html"
    write_text(path, text)
    data = {
        **facts,
        "caches": [{**asdict(line), "mean_accepted": line.mean_accepted} for line in demo.lines],
        "continuation": asdict(demo.continuation),
        "tuned": demo.tuned.to_dict(),
    }
    write_text(folder / "demo.json", json_text(data, indent=2) + "\n")
    return path


def first_tuned(demo: Demo) -> Line:
    """The line of the cache that the page is about: the first that is none of the others."""
    return next(line for line in demo.lines if line.name not in (FULL, ALONE, LESS))


def percent(share: float) -> str:
    """A share such as 5.00 % or 1.25 %, without the digits that say nothing."""
    return f"{100 * share:.3g} %"


def times(ratio: float) -> str:
    """How often something is faster, with as many digits as such a time bears."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def won_back(share: Recovery | None) -> str:
    """The part of the gap with its interval, as text."""
    if share is None:
        return ""
    if math.isnan(share.low):
        return f"{share.share:.0%}"
    return f"{share.share:.0%} ({share.low:.0%} to {share.high:.0%})"


def _line_row(line: Line, full: Line, new_tokens: int) -> str:
    if line is full:
        kept, gap = f"{new_tokens}", "&ndash;"
    else:
        kept = f"{line.mean_accepted:.1f} <small>({line.low:.1f} to {line.high:.1f})</small>"
        gap = won_back(line.recovery) or "&ndash;"
    ratio = line.speed.tokens_per_second / full.speed.tokens_per_second
    faster = "" if line is full else f" <small>&times; {times(ratio)}</small>"
    told = (
        html.escape(line.name),
        html.escape(line.slots),
        f"{line.nbytes / 1024:,.0f}&nbsp;KiB",
        f"{percent(line.share)}{_bar(line.share)}",
        f"{line.perplexity:.2f}",
        gap,
        f"{kept}{_bar(line.mean_accepted / new_tokens)}",
        f"{line.speed.tokens_per_second:,.0f}{faster}",
        f"{line.speed.prompt_seconds:.1f}&nbsp;s",
    )
    kind = {FULL: "full", ALONE: "plain", LESS: "plain"}.get(line.name, "tuned")
    return f'<tr class="{kind}">{cells(told)}</tr>'


def _bar(share: float) -> str:
    return f'<b class="bar" style="--share:{min(1.0, share):.3f}"></b>'


def _heads(config: CacheConfig) -> str:
    """Slots by layer and KV head, the more the darker, and what else differs by layer."""
    most = max(map(max, config.capacities))
    heads = "".join(f"<th>head {head}</th>" for head in range(config.kv_heads))
    rows = [f"<tr><th></th>{heads}<th>pairs</th><th>policy</th><th>state</th></tr>"]
    for index, layer in enumerate(config.layers):
        shades = [f"<td>layer {index}</td>"]
        for slots in layer.capacities:
            # Few slots matter as much as many: shades follow the logarithm.
            depth = (math.log1p(slots) / math.log1p(most)) ** 3
            light = " light" if depth > 0.6 else ""
            shades.append(f'<td class="head{light}" style="--depth:{depth:.2f}">{slots}</td>')
        words = (
            codes_text(layer.quantization).removesuffix(" (calibrated)"),
            type(layer.policy).__name__,
            f"rank {layer.rank}" if layer.rank else "&ndash;",
        )
        rows.append(f"<tr>{''.join(shades)}{cells(words)}</tr>")
    return "\n".join(rows)


def _continuations(demo: Demo) -> str:
    """A column a cache; what is no longer the full cache's is pale."""
    shown, columns = demo.continuation, []
    tuned = [line.name for line in demo.lines if line.name not in (FULL, ALONE, LESS)]
    for name in (FULL, *tuned, LESS, ALONE):
        kept, changed = html.escape(shown.kept[name]), html.escape(shown.changed[name])
        if name == FULL:
            told, text = "what the others are held against", kept
        else:
            told = f"{shown.accepted[name]} of {demo.facts['new_tokens']} tokens the same"
            text = f"<mark>{kept}</mark><s>{changed}</s>"
        title = f"<h3>{html.escape(name)}</h3><p>{told}</p>"
        columns.append(f"<section>{title}<pre>{text}</pre></section>")
    return "\n".join(columns)


def draw_excess(demo: Demo) -> Any:
    """Loss above the full cache by position: where in a text each cache hurts."""
    figure, axes = blank_figure("What a text's later tokens lose")
    full = demo.line(FULL)
    greens = iter((COLOURS["good"], "#7fb8a8"))
    for line in demo.lines:
        if line is full:
            continue
        colour, dashes = STYLES.get(line.name) or (next(greens, COLOURS["good"]), "-")
        extra = [a - b for a, b in zip(line.losses, full.losses, strict=True)]
        label = f"{line.name} ({percent(line.share)})" if line.name in STYLES else line.name
        axes.plot(line.positions, extra, dashes, color=colour, label=label, lw=2)
    axes.axhline(0, color=COLOURS["muted"], lw=1)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("nats a token above the full cache")
    axes.set_xlim(0, None)
    axes.legend(frameon=False)
    return figure
