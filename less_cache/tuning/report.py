"""What a tuning found, as one page, one JSON file and two pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from .._files import json_text, replaced, write_text
from ..config import CacheConfig

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
        path = folder / f"{name}.png"
        with replaced(path) as temporary:
            draw(report).savefig(temporary, format="png", dpi=140)
        pictures[name] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        written.append(path)
    budget, full = report["budget"], report["full"]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        share=f"{budget['bytes'] / budget['full_cache_bytes']:.2%}",
        model=html.escape(str(report["model_id"] or "The model")),
        bytes=f"{budget['bytes']:,}",
        full_bytes=f"{budget['full_cache_bytes']:,}",
        context=f"{budget['context']:,}",
        tokens=f"{report['validation_tokens']:,}",
        verdicts=_verdicts(report, full),
        layers=_layers(report),
        additive=html.escape(_additive(report)),
        around=_rows(
            (name, value)
            for name, value in {
                "command": report["command"],
                "date": report["date"],
                **report["machine"],
                **report["versions"],
            }.items()
        ),
        **pictures,
    )
    written.append(folder / "index.html")
    write_text(written[-1], page)
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
        figsize=(max(5.0, 1.8 + 0.75 * heads), max(2.2, 1.0 + 0.42 * layers)), layout="constrained"
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
        bits = "as they are" if codes is None else f"{codes.key_bits}, {codes.value_bits} bits"
        names.append(f"layer {layer}: {bits}" + (f", rank {rank}" if rank else ""))
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
    head = ["cache", "bytes a sequence", "perplexity", "nats a token from full"]
    rows = [(False, ["full cache", "grows", f"{math.exp(full['loss']):.3f}", "0"])]
    for own in report["verdicts"]:
        cells = [
            own["name"],
            f"{own['nbytes']:,}",
            f"{math.exp(own['loss']):.3f}",
            f"{own['divergence']:.4f}",
        ]
        rows.append((own["name"] == report["taken"], cells))
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "\n".join(
        f"<tr{' class=taken' if taken else ''}>{_cells(cells)}</tr>" for taken, cells in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{body}</table></div>'


def _layers(report: Mapping[str, Any]) -> str:
    config = CacheConfig.from_dict(report["config"])
    rows = []
    for index, layer in enumerate(config.layers):
        codes = layer.quantization
        rows.append(
            (
                index,
                str(layer.policy),
                "as they are" if codes is None else f"{codes.key_bits} and {codes.value_bits} bits",
                layer.rank or "no state",
                f"{layer.bytes_per_sequence:,}",
            )
        )
    top = "".join(
        f"<th>{name}</th>" for name in ("layer", "policy", "keys and values", "rank", "bytes")
    )
    return f'<div class="wide"><table><tr>{top}</tr>\n{_rows(rows)}</table></div>'


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


def _rows(rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)


def _cells(row: Iterable[Any]) -> str:
    return "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
