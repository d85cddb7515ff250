"""Show that memory stays flat while a sequence grows, here to 100,000 tokens.

A small decoder of random weights decodes one sequence with a LESS cache, and for a while with
transformers' `DynamicCache`. The process's resident memory (RSS) is what the system says.

    python benchmarks/memory.py
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import psutil
import torch
import typer
from rich.console import Console
from rich.progress import Progress

mpl.use("Agg")
from matplotlib import pyplot as plt

# The repository's root, so that this also runs as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Contestant, Dynamic, Less, full_bytes
from benchmarks.measuring import surroundings
from examples.custom_loop import Decoder, Shape
from less_cache.policies import parse_policy

MODEL = Shape(
    vocabulary=256,
    layers=2,
    hidden=128,
    intermediate=256,
    query_heads=2,
    kv_heads=2,
    head_dim=64,
)
FIRST = 2
"""The tokens that a cache is made with; all later ones are decoded."""
SAMPLES = 100
RESULTS = Path(__file__).parent / "results"


def decode(
    decoder: Decoder, contestant: Contestant, tokens: int, progress: Progress, name: str
) -> list[dict[str, int]]:
    """Decode up to `tokens`, and note now and then how much memory the process has gained."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    token = torch.zeros(1, 1, dtype=torch.int64)
    task = progress.add_task(name, total=tokens)
    samples = []
    every = max(1, tokens // SAMPLES)
    for seen in range(FIRST, tokens + 1):
        logits = decoder(token, seen - 1, contestant.attend)
        token = logits.argmax(1, keepdim=True)
        if seen % every == 0:
            rss = psutil.Process().memory_info().rss
            samples.append({"tokens": seen, "rss": rss, "rss_gained": rss - before})
            progress.update(task, completed=seen)
    progress.update(task, completed=tokens)
    return samples


def plot(report: dict[str, Any], path: Path) -> None:
    """What the process gained with each cache, and what a growing one holds."""
    state = report["less"]["state_bytes"] / 1e6
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    for name, label, colour in (
        ("dynamic", "DynamicCache: what the process gained", "#b04a3a"),
        ("less", f"LESS: what the process gained (its state: {state:.2g} MB)", "#1f5fa8"),
    ):
        samples = report[name]["samples"]
        tokens = [sample["tokens"] for sample in samples]
        gained = [sample["rss_gained"] / 1e6 for sample in samples]
        axis.plot(tokens, gained, label=label, color=colour, linewidth=2, clip_on=False)
    ends = [0, report["tokens"]]
    rate = report["dynamic"]["bytes_per_token"]
    axis.plot(
        ends,
        [end * rate / 1e6 for end in ends],
        label="DynamicCache: what its tensors take",
        color="#b04a3a",
        linestyle=":",
    )
    axis.set_xlabel("tokens decoded")
    axis.set_ylabel("MB")
    axis.set_xlim(0, report["tokens"])
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}k")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    tokens: Annotated[int, typer.Option(min=10, help="To decode with LESS.")] = 100_000,
    full_tokens: Annotated[
        int, typer.Option(min=10, help="To decode with the growing cache.")
    ] = 8_000,
    capacity: Annotated[int, typer.Option(min=3, help="Slots.")] = 256,
    policy: Annotated[str, typer.Option(help="Such as h2o or sinkwindow:sinks=4.")] = "h2o",
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's.")] = 1,
    json_file: Annotated[Path, typer.Option("--json", help="Results.")] = RESULTS / "memory.json",
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Plot; default: beside the results.")
    ] = None,
) -> None:
    """Decode a long sequence and watch the process's memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    console = Console()
    decoder = Decoder(MODEL).eval()
    less = Less(MODEL, FIRST, 1, capacity=capacity, policy=parse_policy(policy))
    with torch.inference_mode(), Progress(console=console) as progress:
        # The first steps load code and start thread pools, which is no cache's doing.
        decode(decoder, less, 10, progress, "warm-up")
        less_samples = decode(decoder, less, tokens, progress, "LESS")
        grown = Dynamic(MODEL, FIRST, 1)
        full_samples = decode(decoder, grown, full_tokens, progress, "DynamicCache")
    # The first tenth is left out: an allocator needs a while to settle.
    settled = less_samples[len(less_samples) // 10 :]
    report = {
        "tokens": tokens,
        "growth_bytes": settled[-1]["rss"] - settled[0]["rss"],
        "peak_rss": max(sample["rss"] for sample in less_samples),
        "less": {
            "capacity": capacity,
            "policy": policy,
            "state_bytes": less.nbytes,
            "samples": less_samples,
        },
        "dynamic": {
            "tokens": full_tokens,
            "bytes_per_token": full_bytes(MODEL, 1, 1),
            "samples": full_samples,
        },
        "model": vars(MODEL),
        **surroundings(),
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, png_file or json_file.with_suffix(".png"))
    console.print(
        f"From {settled[0]['tokens']:,} to {tokens:,} tokens the process grew by "
        f"{report['growth_bytes'] / 1e6:.2f} MB; the LESS state has {less.nbytes / 1e6:.2f} MB "
        f"throughout. A full cache would hold {full_bytes(MODEL, tokens, 1) / 1e6:.1f} MB."
    )


if __name__ == "__main__":
    typer.run(main)
