"""The long-range result as one page, one JSON file and one picture."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import json_text, replaced, write_text
from .long_range import LongRange
from .pages import around_rows, as_png, inline, page, table

PAGE = Path(__file__).parent / "longrange.html"
TITLES = {
    "passkey": "one number",
    "multikey": "one of four numbers",
    "variables": "five variables of a chain",
}
COLOURS = ("#c4572e", "#f2e3c6", "#2f7d6b")
"""Nothing recalled, half of it, all of it."""


def save_long_range(result: LongRange, folder: Path) -> list[Path]:
    """Write ``longrange.json``, ``depth.png`` and ``index.html``; the files' paths."""
    written = [folder / "longrange.json"]
    write_text(written[0], json_text(result.as_json(), indent=2) + "\n")
    picture = ""
    if result.cells:
        written.append(folder / "depth.png")
        png = as_png(draw_depths(result))
        with replaced(written[-1]) as temporary:
            temporary.write_bytes(png)
        picture = inline(png)
    written.append(folder / "index.html")
    text = page(
        PAGE,
        model=html.escape(str(result.facts["model"])),
        hidden=_hidden(result, picture),
        text=_text(result),
        around=around_rows(result.facts),
    )
    write_text(written[-1], text)
    return written


def draw_depths(result: LongRange) -> Any:
    """Depth against length: a row of panels a task, a panel a cache; the share recalled."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    tasks = [*dict.fromkeys(cell.task for cell in result.cells)]
    lengths, depths = result.facts["lengths"], result.facts["depths"]
    colours = LinearSegmentedColormap.from_list("recalled", COLOURS)
    size = (1.6 + len(result.caches) * max(1.9, 0.62 * len(lengths)), 0.9 + 2.3 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(tasks), len(result.caches), squeeze=False, sharex=True, sharey=True
    )
    image: Any = None
    for row, task in enumerate(tasks):
        for column, cache in enumerate(result.caches):
            axes = panels[row][column]
            shares = {(c.depth, c.length): c.recalled for c in result.of(cache, task)}
            grid = [[shares[depth, length] for length in lengths] for depth in depths]
            image = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
            for y, line in enumerate(grid):
                for x, share in enumerate(line):
                    axes.text(
                        x,
                        y,
                        f"{100 * share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if share < 0.2 or share > 0.8 else "black",
                    )
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title(cache, fontsize=10)
            if row == len(tasks) - 1:
                axes.set_xlabel("tokens", fontsize=9)
            if column == 0:
                axes.set_ylabel(f"{TITLES[task]}\ndepth", fontsize=9)
    bar = figure.colorbar(image, ax=[*panels.flat], fraction=0.03, pad=0.02)
    bar.set_label("recalled", fontsize=9)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def hidden_table(result: LongRange) -> tuple[list[str], list[list[str]]]:
    """Head and rows: of each cache what it recalls of each task, over all lengths and depths."""
    tasks = [*dict.fromkeys(cell.task for cell in result.cells)]
    head = ["cache"]
    for task in tasks:
        head += [f"{TITLES[task]}: recalled", "nats a token"]
    rows = []
    for cache in result.caches:
        row = [cache]
        for task in tasks:
            recalled, nats = result.mean(cache, task)
            row += [
                _estimate(recalled.value, recalled.interval, 0, share=True),
                _estimate(nats.value, nats.interval, 2),
            ]
        rows.append(row)
    return head, rows


def text_table(result: LongRange) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each cache's nats on key tokens and others, and on names by distance."""
    told = [*result.text.values()]
    rows = [
        [f"{told[0]['key_tokens']:,} key tokens", *(_nats(own, "key_nats") for own in told)],
        ["all other tokens", *(_nats(own, "other_nats") for own in told)],
    ]
    for distance in told[0]["names"]:
        names = [own["names"][distance] for own in told]
        rows.append(
            [
                f"{names[0]['names']:,} names, {distance} tokens back",
                *(_nats(own, "nats") for own in names),
            ]
        )
        rows.append(
            [
                f"of {names[0]['several_tokens']:,} of them completed",
                *(
                    _estimate(own["completed"], own["completed_interval"], 0, share=True)
                    for own in names
                ),
            ]
        )
    return ["", *result.text], rows


def _hidden(result: LongRange, picture: str) -> str:
    if not result.cells:
        return ""
    facts = result.facts
    return (
        "<h2>Hidden numbers and chains</h2>\n"
        f"{table(*hidden_table(result))}\n"
        f'<p class="facts">{facts["samples"]} texts ({html.escape(facts["style"])}) of each length '
        "and depth; recalled: the share of the answers that the greedy continuation has; nats a "
        "token of the right one; in brackets 95 %, seeds drawn with replacement.</p>\n"
        f'<img src="{picture}" alt="Share recalled, by depth and length">'
    )


def _text(result: LongRange) -> str:
    if not result.text:
        return ""
    facts = result.facts
    return (
        "<h2>Far context of real text</h2>\n"
        f"{table(*text_table(result))}\n"
        '<p class="facts">Nats a token. Key tokens: the full cache foresees them, at least 2 nats '
        f"better than the model that has read at most the last {facts['short']} tokens. Names: "
        "identifiers that came before in the window, by tokens since; completed: of those of "
        "several tokens, the share whose first token leads greedily to all others. In "
        "brackets 95 %: documents drawn with replacement.</p>"
    )


def _nats(told: Mapping[str, Any], name: str) -> str:
    return _estimate(told[name], told[f"{name}_interval"], 2)


def _estimate(
    value: float | None, interval: Sequence[float] | None, digits: int, *, share: bool = False
) -> str:
    """A number and its interval: 4.59 (4.21 to 4.98); as a share, 59 % (50 to 68)."""
    if value is None:
        return ""
    times, unit = (100, " %") if share else (1, "")
    text = f"{times * value:.{digits}f}{unit}"
    if interval is None:
        return text
    low, high = (f"{times * end:.{digits}f}" for end in interval)
    return f"{text} ({low} to {high})"
