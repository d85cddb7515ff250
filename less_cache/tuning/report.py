"""What a tuning found, as one page, one JSON file and two pictures."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import json_text, replaced, write_text
from ..config import CacheConfig
from ..evaluation.pages import around_rows, as_png, inline, page, table
from ..quantization import Quantization
from ..quantization.settings import bits_text
from .candidates import SIMPLE

PAGE = Path(__file__).parent / "report.html"
INK, SOFT, GOOD, BAD = "#1d2228", "#8a929b", "#2f7d6b", "#c4572e"
SHADES = ("#f4f1e6", "#2f7d6b", "#173f38")
SIMPLE_MARKERS = "osD^v"


def save_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``report.json``, ``heads.png``, ``curve.png`` and ``index.html``; the files' paths."""
    written = [folder / "report.json"]
    write_text(written[0], json_text(report, indent=2) + "\n")
    pictures = {}
    for name, draw in (("heads", draw_heads), ("curve", draw_curve)):
        png = as_png(draw(report))
        written.append(folder / f"{name}.png")
        with replaced(written[-1]) as temporary:
            temporary.write_bytes(png)
        pictures[name] = inline(png)
    budget, full = report["budget"], report["full"]
    text = page(
        PAGE,
        share=f"{budget['bytes'] / budget['full_cache_bytes']:.2%}",
        model=html.escape(str(report["model_id"] or "The model")),
        bytes=f"{budget['bytes']:,}",
        full_bytes=f"{budget['full_cache_bytes']:,}",
        context=f"{budget['context']:,}",
        tokens=f"{report['validation_tokens']:,}",
        verdicts=_verdicts(report, full),
        layers=_layers(report),
        additive=html.escape(_additive(report)),
        around=around_rows(report),
        **pictures,
    )
    written.append(folder / "index.html")
    write_text(written[-1], text)
    return written


def draw_heads(report: Mapping[str, Any]) -> Any:
    """Slots of each KV head of each layer, and the ranks of the layers' states."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure

    config = CacheConfig.from_dict(report["config"])
    grid = [list(layer) for layer in config.capacities]
    most = max(map(max, grid))
    least = min(map(min, grid))
    heads, layers = config.kv_heads, config.num_layers
    figure = Figure(
        figsize=(3.2 + 0.85 * heads, max(2.2, 1.0 + 0.42 * layers)), layout="constrained"
    )
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("slots", SHADES)
    norm = LogNorm(max(1, least), max(most, least + 1))
    axes.imshow(grid, cmap=colours, norm=norm, aspect="auto")
    if heads * layers <= 512:
        for y, row in enumerate(grid):
            for x, slots in enumerate(row):
                dark = norm(slots) > 0.45
                axes.text(
                    x, y, str(slots), ha="center", va="center", fontsize=9,
                    color="white" if dark else INK,
                )  # fmt: skip
    names = []
    for layer, (rank, codes) in enumerate(zip(config.ranks, config.quantizations, strict=True)):
        names.append(f"layer {layer}: {_bits(codes)}" + (f", rank {rank}" if rank else ""))
    axes.set_yticks(range(layers), names, fontsize=8.5)
    axes.set_xticks(range(heads), [f"head {head}" for head in range(heads)], fontsize=8.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("Slots by layer and KV head", loc="left", fontsize=11)
    return figure


def draw_curve(report: Mapping[str, Any]) -> Any:
    """Perplexity against bytes: what was tuned, each simple cache, and the full one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    full = report["budget"]["full_cache_bytes"]
    for entry in [*report["curve"], *report["verdicts"]]:
        bytes_ = entry.get("bytes", report["budget"]["bytes"])
        lines.setdefault(entry["name"], []).append((bytes_ / full, math.exp(entry["loss"])))
    markers = iter(SIMPLE_MARKERS)
    for name, points in lines.items():
        points.sort()
        x, y = zip(*points, strict=True)
        if name == "no state":
            axes.plot(x, y, "-o", color=GOOD, lw=2.2, label="by head and bits, no state")
        elif len(points) > 1:
            axes.plot(x, y, "--", marker=next(markers), ms=4, color=SOFT, lw=1.2, label=name)
    taken = next(entry for entry in report["verdicts"] if entry["name"] == report["taken"])
    axes.plot(
        report["budget"]["bytes"] / full, math.exp(taken["loss"]), "*", ms=15, color=BAD,
        label=f"taken: {report['taken']}",
    )  # fmt: skip
    axes.axhline(math.exp(report["full"]["loss"]), color=INK, lw=1, ls=":", label="full cache")
    axes.set_xscale("log")
    axes.set_xticks(sorted({point[0] for line in lines.values() for point in line}))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2%}")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("bytes a sequence, as a share of the full cache's in 16 bits")
    axes.set_ylabel("perplexity")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def _verdicts(report: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    simple = {name for name, _, _ in SIMPLE}
    head = ["cache", "bytes a sequence", "perplexity", "nats a token from full"]
    rows = [["full cache", "grows", f"{math.exp(full['loss']):.3f}", "0"]]
    taken = None
    for own in report["verdicts"]:
        cells = [
            own["name"],
            f"{own['nbytes']:,}",
            f"{math.exp(own['loss']):.3f}",
            f"{own['divergence']:.4f}",
        ]
        if own["name"] in simple:
            cells[0] += ", equal slots, not tuned"
        if own["name"] == report["taken"]:
            taken = len(rows)
        rows.append(cells)
    return table(head, rows, taken)


def _layers(report: Mapping[str, Any]) -> str:
    config = CacheConfig.from_dict(report["config"])
    rows = []
    for index, layer in enumerate(config.layers):
        rows.append(
            (
                index,
                str(layer.policy),
                _bits(layer.quantization),
                layer.rank or "no state",
                f"{layer.bytes_per_sequence:,}",
            )
        )
    return table(("layer", "policy", "keys and values", "rank", "bytes"), rows)


def _bits(codes: Quantization | None) -> str:
    """Of keys and of values, on average over their channels."""
    if codes is None:
        return "as they are"
    return f"{bits_text(codes.key_bits)} and {bits_text(codes.value_bits)} bits"


def _additive(report: Mapping[str, Any]) -> str:
    measured = {own["name"]: own["divergence"] for own in report["verdicts"]}
    told = [
        f"{name}: the heads' own losses sum up to {loss:.4f} nats a token, and the whole cache "
        f"loses {measured[name]:.4f}"
        for name, loss in report["predicted"].items()
        if name in measured
    ]
    return (
        "Bytes are handed out as if they did. On other text than they were measured on: "
        + "; ".join(told)
        + "."
    )
