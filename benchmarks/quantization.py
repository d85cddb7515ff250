"""What coded slots keep of a model's quality for their bytes, beside other caches.

On the shipped reference model and its held-out text, every cache of constant size with the bytes
that LESS takes at 5 % in 16 bits; transformers' `QuantizedCache`, which grows, beside a cache that
codes every pair and evicts none.

    python benchmarks/quantization.py --no-speed
    python benchmarks/quantization.py --no-quality

Each writes its own part of the result file and leaves the other.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

# The repository's root, so that this also runs as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import less_cache as lc
from benchmarks.leaderboard.continuing import cache_bytes
from benchmarks.measuring import surroundings
from benchmarks.options import numbers
from less_cache.evaluation.perplexity import Contestant, Window, cut_windows, score, spread_over
from less_cache.policies import parse_policy
from less_cache.quantization import TRANSFORMS
from less_cache.reference_model import held_out_documents, load
from less_cache.reference_model.shipped_maps import shipped, training_windows
from less_cache.training import calibrate

RESULTS = Path(__file__).parent / "results"
SHARE, RANK = 0.05, 8
"""Of the LESS cache whose bytes all others get."""
PEERS = {"2 bits": ("quanto", 2), "4 bits": ("quanto", 4), "float8": ("fp8", None)}
PROMPT = 128
"""Tokens that a peer, which needs a prompt for its scales, takes at once."""
CALIBRATION = 24
"""Windows of training text."""


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Parameters
    ----------
    name
        Of the cache.
    nbytes
        Of a sequence of the windows' length; numbers that are not coded count 16 bits.
    grows
        Whether it takes more with every token.
    slots
        Of a head; ``None`` where it grows.
    contestant
        As `score` takes it; ``None`` for a peer.
    peer
        Makes an empty cache of transformers; ``None`` for ours.
    missing
        Why it cannot be measured here; "": it can.
    timed
        Whether its steps are timed.
    """

    name: str
    nbytes: int | None
    grows: bool
    slots: int | None = None
    contestant: Contestant | None = None
    peer: Callable[[], Cache] | None = None
    missing: str = ""
    timed: bool = True


class Bases:
    """The transforms of a model by bits, fitted once."""

    def __init__(self, model: Any, windows: int) -> None:
        self.model = model
        self.tokens = training_windows(windows)
        self.made: dict[int, lc.Transforms] = {}

    def of(self, config: lc.CacheConfig) -> lc.Transforms | None:
        """Those that a config needs."""
        codes = config.quantization
        if codes is None or codes.transform == "hadamard":
            return None
        if codes.key_bits not in self.made:
            self.made[codes.key_bits] = calibrate(self.model, config, self.tokens)
        return self.made[codes.key_bits]


def growing(model: Any, bits: Sequence[int], length: int, bases: Bases) -> Iterator[Entry]:
    """The model's own cache, transformers' quantised ones, and ours that evicts nothing."""
    make = DynamicCache
    yield Entry("full cache", filled_bytes(make(), model, length), True, peer=make)
    for label, (backend, nbits) in PEERS.items():
        options = {} if nbits is None else {"nbits": nbits}

        def made(backend: str = backend, options: dict[str, int] = options) -> Cache:
            return QuantizedCache(backend, model.config, **options)

        name = f"QuantizedCache, {label}"
        try:
            nbytes = filled_bytes(made(), model, length)
        except ImportError:
            yield Entry(name, None, True, missing="needs optimum-quanto")
            continue
        yield Entry(name, nbytes, True, peer=made)
    for transform in TRANSFORMS:
        for width in bits:
            config = _config(model, lc.FullCache(), length, width, transform)
            name = f"all pairs, {width} bits, {transform}"
            held = Contestant(name, config, transforms=bases.of(config))
            used = config.bytes_per_sequence("float16")
            yield Entry(name, used, True, contestant=held, timed=False)


def constant(
    model: Any, policies: Sequence[lc.Policy], bits: Sequence[int], length: int, bases: Bases
) -> Iterator[Entry]:
    """LESS as it ships, and what its bytes hold as slots, coded or not."""
    maps = shipped("h2o", SHARE)
    less = lc.CacheConfig.from_model(
        model.config, capacity=SHARE, policy=lc.H2O(), rank=RANK, max_positions=length
    )
    budget = less.bytes_per_sequence("float16")
    slots = less.layer(0).capacity
    yield Entry("LESS on H2O, 16 bits", budget, False, slots, Contestant("LESS", less, maps))
    for policy in policies:
        choices = [(None, "hadamard"), *((w, t) for t in TRANSFORMS for w in bits)]
        for width, transform in choices:
            config = _config(model, policy, 16, width, transform)
            narrow = config.with_dtype("float16").layer(0)
            room = budget / config.num_layers / config.kv_heads
            # Uncoded slots are rounded up, coded ones down.
            rounded = math.ceil if width is None else math.floor
            config = config.replace(capacity=rounded(room / narrow.slot_bytes))
            told = "16 bits" if width is None else f"{width} bits, {transform}"
            name = f"{type(policy).__name__}, {told}"
            held = Contestant(name, config, transforms=bases.of(config))
            used = config.bytes_per_sequence("float16")
            timed = policy == policies[0]
            yield Entry(name, used, False, config.layer(0).capacity, held, timed=timed)


def _config(
    model: Any, policy: lc.Policy, capacity: int, width: int | None, transform: str
) -> lc.CacheConfig:
    codes = None if width is None else lc.Quantization(width, width, transform)
    return lc.CacheConfig.from_model(
        model.config, capacity=capacity, policy=policy, rank=0, quantization=codes
    )


def filled_bytes(cache: Cache, model: Any, tokens: int) -> int:
    """What a cache of transformers holds after so many tokens of 16 bits."""
    shapes = lc.CacheConfig.from_model(model.config, capacity=1, policy=lc.FullCache(), rank=0)
    for layer in range(shapes.num_layers):
        for count in (tokens - 1, 1):
            size = (1, shapes.kv_heads, count, shapes.head_dim)
            cache.update(*torch.randn(2, *size).half(), layer)
    return cache_bytes(cache, 1)


@torch.no_grad()
def perplexity(model: Any, entry: Entry, windows: Sequence[Window], batch: int) -> float:
    """As if decoded token by token; peers take their first tokens at once."""
    if entry.contestant is not None:
        return score(model, windows, entry.contestant, batch=batch).perplexity()
    if entry.name == "full cache":
        return score(model, windows, Contestant(entry.name), batch=batch).perplexity()
    if entry.peer is None:
        raise ValueError(f"entry: {entry.name} has no cache")
    losses = []
    for start in range(0, len(windows), batch):
        ids = torch.stack([window.ids for window in windows[start : start + batch]])
        cache = entry.peer()
        parts = [ids[:, :PROMPT], *ids[:, PROMPT:-1].split(1, 1)]
        logits = [model(part, past_key_values=cache).logits for part in parts]
        found = torch.cat(logits, 1).log_softmax(2)
        losses.append(-found.gather(2, ids[:, 1:].unsqueeze(2)).flatten())
    return math.exp(float(torch.cat(losses).double().mean()))


def quality_row(model: Any, entry: Entry, windows: Sequence[Window], batch: int) -> dict[str, Any]:
    """What the result file says of an entry."""
    row = {
        "name": entry.name,
        "slots": entry.slots,
        "nbytes": entry.nbytes,
        "grows": entry.grows,
    }
    if entry.missing:
        return {**row, "missing": entry.missing}
    return {**row, "perplexity": perplexity(model, entry, windows, batch)}


@torch.no_grad()
def decode_seconds(model: Any, entry: Entry, prompt: Tensor, steps: int) -> float:
    """Seconds of so many greedy steps after a prompt, which is not timed."""
    if entry.peer is not None:
        return _steps(model, entry.peer(), prompt, steps)
    held = entry.contestant
    if held is None or held.config is None:
        raise ValueError(f"entry: {entry.name} has no cache")
    with lc.attach(model, held.config, held.maps, transforms=held.transforms) as handle:
        return _steps(model, handle.new_cache(), prompt, steps)


def _steps(model: Any, cache: Any, prompt: Tensor, steps: int) -> float:
    token = prompt
    started = 0.0
    for step in range(steps + 1):
        out = model(token, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(2)
        if step == 0:
            started = time.perf_counter()
    return time.perf_counter() - started


def measure_speed(
    model: Any, entries: Sequence[Entry], prompt: Tensor, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Tokens a second of each, in turn: a noisy neighbour then hits them all."""
    seconds: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for turn in range(-1, repeats):
        for entry in entries:
            taken = decode_seconds(model, entry, prompt, steps)
            if turn >= 0:
                seconds[entry.name].append(taken)
    return [
        {
            "name": name,
            "tokens_per_second": len(prompt) * steps / statistics.median(taken),
            "step_ms": statistics.median(taken) / steps * 1e3,
        }
        for name, taken in seconds.items()
    ]


def save(report: dict[str, Any], path: Path) -> None:
    """Write the result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


HEAD = ("cache", "slots", "bytes a sequence", "perplexity", "gap won back", "tokens a second")


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The lines of the table, as text, whichever parts have been measured."""
    speed = {row["name"]: row for row in report.get("speed", {}).get("rows", ())}
    quality = report.get("quality", {}).get("rows", ())
    found = {row["name"]: row.get("perplexity") for row in quality}
    full, worst = found.get("full cache"), found.get("H2O, 16 bits")
    rows = []
    for row in quality:
        name, value = row["name"], row.get("perplexity")
        won = ""
        if None not in (value, full, worst) and value not in (full, worst):
            won = f"{(worst - value) / (worst - full):.0%}"
        told = f"{value:.2f}" if value is not None else f"not measured: {row['missing']}"
        nbytes = "" if row["nbytes"] is None else f"{row['nbytes']:,}"
        nbytes += ", grows" if row["grows"] and nbytes else ""
        rate = f"{speed[name]['tokens_per_second']:,.0f}" if name in speed else ""
        rows.append([name, str(row["slots"] or ""), nbytes, told, won, rate])
    return rows


def main(
    windows: Annotated[int, typer.Option(min=1, help="Of held-out text.")] = 24,
    length: Annotated[int, typer.Option(min=4, help="Tokens a window.")] = 1024,
    bits: Annotated[str, typer.Option(help="Of a number, on average.")] = "2,3,4,8",
    policies: Annotated[
        list[str] | None, typer.Option(help="The first is timed; default: h2o, sinkwindow:sinks=4.")
    ] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Windows of training text.")] = (
        CALIBRATION
    ),
    quality: Annotated[bool, typer.Option(help="Measure perplexities.")] = True,
    speed: Annotated[bool, typer.Option(help="Time decode steps.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps after a prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Of the timed steps.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's.")] = 1,
    json_file: Annotated[Path, typer.Option("--json", help="Results.")] = RESULTS
    / "quantization.json",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Measure what coded slots keep, and what a step with them costs."""
    if length < PROMPT + 2:
        raise typer.BadParameter(f"length: got {length}, expected at least {PROMPT + 2}")
    torch.set_num_threads(threads)
    model, tokenizer = load()
    documents = [
        (d.name, torch.tensor(tokenizer(d.text)["input_ids"])) for d in held_out_documents()
    ]
    cut = cut_windows(documents, length)
    cut = spread_over(cut, windows)
    widths = numbers(bits)
    rules = [parse_policy(text) for text in policies or ("h2o", "sinkwindow:sinks=4")]
    bases = Bases(model, calibration)
    entries = [
        *growing(model, widths, length, bases),
        *constant(model, rules, widths, length, bases),
    ]
    report = json.loads(json_file.read_text()) if json_file.exists() else {}
    if quality:
        rows: list[dict[str, Any]] = []
        facts = {"windows": len(cut), "length": length, "calibration": calibration}
        report["quality"] = {"rows": rows, **facts, **surroundings()}
        for entry in entries:
            rows.append(quality_row(model, entry, cut, batch))
            # It takes long: whoever stops it keeps what there is.
            save(report, json_file)
    if speed:
        timed = [entry for entry in entries if entry.timed and not entry.missing]
        prompt = torch.stack([cut[i % len(cut)].ids[: length - steps - 1] for i in range(batch)])
        rows = measure_speed(model, timed, prompt, steps, repeats)
        facts = {"prompt": prompt.shape[1], "batch": batch, "steps": steps, "repeats": repeats}
        report["speed"] = {"rows": rows, **facts, **surroundings()}
    save(report, json_file)
    rows_of_text = table_rows(report)
    if markdown:
        for cells in (HEAD, ["---"] * len(HEAD), *rows_of_text):
            print("| " + " | ".join(cells) + " |")
        return
    table = Table()
    for column in HEAD:
        table.add_column(column, no_wrap=column == "cache")
    for cells in rows_of_text:
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
