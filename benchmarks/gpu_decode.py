"""Whole-model decode and prompt on one CUDA GPU: full cache, eviction alone (rank 0), and LESS.

Llama shapes with random fp16 weights, each decode step one CUDA graph, all contestants in one run::

    python -m benchmarks.gpu_decode         # writes JSON and a roofline plot into results/

The full cache attends by torch's `scaled_dot_product_attention`, which takes flash or cuDNN there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import less_cache as lc
from benchmarks.gpu_predictions import HIDDEN, SHAPES, SHARE, Shape, count_less

RESULTS = Path(__file__).parent / "results"


class Full:
    """A cache of all tokens, attended by torch's best kernel; `context` tokens at every step."""

    def __init__(self, shape: Shape, batch: int, context: int, device: str, dtype: torch.dtype):
        size = (shape.layers, 2, batch, shape.kv_heads, context, shape.head_dim)
        self.pairs = torch.empty(size, device=device, dtype=dtype).normal_()
        self.grouped = shape.query_heads != shape.kv_heads

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, S, D]: a step writes its pair last, a prompt attends over itself."""
        tokens = q.shape[2]
        if tokens > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        keys, values = self.pairs[layer]
        keys[:, :, -1:], values[:, :, -1:] = k, v
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.grouped)


class Less:
    """`CacheManager` on the Triton backend, full from the start; rank 0: the policy alone."""

    def __init__(
        self,
        shape: Shape,
        batch: int,
        capacity: int,
        rank: int,
        device: str,
        dtype: torch.dtype,
        hidden: int = HIDDEN,
    ):
        config = lc.CacheConfig(
            num_layers=shape.layers,
            query_heads=shape.query_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            capacity=capacity,
            policy=lc.H2O(),
            rank=rank,
            dtype=dtype,
        )
        maps = lc.FeatureMaps.initialise(config, hidden=hidden) if rank else None
        self.manager = lc.CacheManager(config, maps, backend="triton")
        self.state = self.manager.init(batch, device=device)

    def fill(self) -> None:
        """As after many tokens: every slot holds a pair, every score is set."""
        for layer in self.state.layers:
            for array in (layer.keys, layer.values):
                array.normal_()
            for positive in (layer.scores, layer.H, layer.z):
                positive.uniform_()
            capacity = self.manager.config.layer(0).capacity
            slots = torch.arange(capacity, device=layer.positions.device)
            layer.positions.copy_(slots.repeat(self.manager.config.kv_heads))
            layer.length.fill_(capacity)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, S, D]."""
        return self.manager.attend(self.state, layer, q, k, v)


class Decoder:
    """Random weights in Llama's shapes: projections, attention, gated feed-forward, output."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        self.shape = shape

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, device=device, dtype=dtype).normal_(std=rows**-0.5)

        self.heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
        width, inner = shape.width, shape.inner
        self.layers = [
            (
                matrix(width, sum(self.heads) * shape.head_dim),
                matrix(shape.query_heads * shape.head_dim, width),
                matrix(width, 2 * inner),
                matrix(inner, width),
            )
            for _ in range(shape.layers)
        ]
        self.output = matrix(width, shape.vocabulary)

    def forward(self, x: Tensor, cache: Full | Less) -> Tensor:
        """X [B, S, width] to the last token's logits [B, vocabulary]."""
        batch, tokens, width = x.shape
        sizes = [count * self.shape.head_dim for count in self.heads]
        for index, (qkv, project, up, down) in enumerate(self.layers):
            parts = (F.rms_norm(x, (width,)) @ qkv).split(sizes, 2)
            q, k, v = (
                part.view(batch, tokens, count, self.shape.head_dim).transpose(1, 2)
                for part, count in zip(parts, self.heads, strict=True)
            )
            out = cache.attend(index, q, k, v)
            x = x + out.transpose(1, 2).reshape(batch, tokens, -1) @ project
            gate, value = (F.rms_norm(x, (width,)) @ up).chunk(2, 2)
            x = x + (F.silu(gate) * value) @ down
        return F.rms_norm(x[:, -1], (width,)) @ self.output


def seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call on the current CUDA stream."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2]


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`call` as one CUDA graph, warmed up on a stream of its own first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def measure_decode(decoder: Decoder, cache: Full | Less, batch: int) -> float:
    """Seconds of a decode step of the whole model, as one CUDA graph."""
    x = torch.randn(batch, 1, decoder.shape.width, device="cuda", dtype=torch.float16)
    graph = captured(lambda: decoder.forward(x, cache))
    return seconds(graph.replay)


def measure_attention(cache: Less, shape: Shape, batch: int) -> float:
    """Seconds of one step of all layers' caches alone, as one CUDA graph."""
    q, k, v = (
        torch.randn(batch, count, 1, shape.head_dim, device="cuda", dtype=torch.float16)
        for count in (shape.query_heads, shape.kv_heads, shape.kv_heads)
    )
    graph = captured(lambda: [cache.attend(i, q, k, v) for i in range(shape.layers)])
    return seconds(graph.replay)


def measure_prompt(decoder: Decoder, cache: Full | Less, tokens: int) -> float:
    """Seconds of a prompt through the whole model, from an empty cache."""
    x = torch.randn(1, tokens, decoder.shape.width, device="cuda", dtype=torch.float16)

    def prompt() -> None:
        if isinstance(cache, Less):
            cache.state.reset()
        decoder.forward(x, cache)

    return seconds(prompt, repeats=5)


def contestants(shape: Shape, batch: int, context: int) -> dict[str, Callable[[], Full | Less]]:
    """By name; each is made when its turn comes, so that only one is in memory at a time."""
    slots = round(SHARE * context)
    return {
        "full": lambda: Full(shape, batch, context, "cuda", torch.float16),
        "rank 0": lambda: Less(shape, batch, slots, 0, "cuda", torch.float16),
        "LESS": lambda: Less(shape, batch, slots, 8, "cuda", torch.float16),
    }


def measure(shape: Shape, contexts: list[int], batches: list[int]) -> list[dict[str, Any]]:
    """Every contestant at every context and batch that fits, and prompts at batch 1."""
    decoder = Decoder(shape, "cuda", torch.float16)
    rows = []
    for context in contexts:
        for batch in batches:
            for name, make in contestants(shape, batch, context).items():
                row = {"shape": shape.name, "context": context, "batch": batch, "cache": name}
                try:
                    cache = make()
                    if isinstance(cache, Less):
                        cache.fill()
                        rank = 8 if name == "LESS" else 0
                        count = count_less(shape, batch, round(SHARE * context), rank)
                        spent = measure_attention(cache, shape, batch)
                        row |= {"attention_s": spent, "bytes_per_s": count.bytes / spent}
                        cache.fill()
                    row["step_s"] = measure_decode(decoder, cache, batch)
                    row["tokens_per_s"] = batch / row["step_s"]
                    if batch == 1:
                        row["prompt_s"] = measure_prompt(decoder, cache, context)
                except torch.cuda.OutOfMemoryError:
                    row["out_of_memory"] = True
                cache = None
                torch.cuda.empty_cache()
                print(json.dumps(row), flush=True)
                rows.append(row)
    return rows


def plot_roofline(rows: list[dict[str, Any]], bandwidth: float, path: Path) -> None:
    """Bytes a second that the caches' kernels reach, over batch, against the copy's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in ("rank 0", "LESS"):
        for context in sorted({row["context"] for row in rows}):
            chosen = [
                r
                for r in rows
                if r["cache"] == name and r["context"] == context and "bytes_per_s" in r
            ]
            axes.plot(
                [r["batch"] for r in chosen],
                [r["bytes_per_s"] / bandwidth for r in chosen],
                marker="o",
                label=f"{name}, context {context}",
            )
    axes.axhline(1.0, color="grey", label="copy")
    axes.set(xscale="log", xlabel="batch", ylabel="share of the copy bandwidth", ylim=(0, 1.1))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 48, 64, 256])
    parser.add_argument("--json", type=Path, help="write the report there alone, without a plot")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "gpu_decode: needs a CUDA GPU, found none; "
            "python -m benchmarks.gpu_predictions says what to expect of one",
            file=sys.stderr,
        )
        return 2
    shape = SHAPES[options.shape]
    bandwidth = copy_bandwidth()
    rows = measure(shape, options.context, options.batch)
    card = torch.cuda.get_device_name()
    report = {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        return 0
    RESULTS.mkdir(exist_ok=True)
    stem = f"gpu_decode_{shape.name}_{card.replace(' ', '_')}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_roofline(rows, bandwidth, RESULTS / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
