"""Bytes and operations of a whole-model decode step, and predicted times.

No GPU is needed: this counts, and `gpu_model` says how long the cache's kernels take.
`gpu_decode.py` measures. It prints the table of docs/performance.md::

    python -m benchmarks.gpu_predictions
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from benchmarks import gpu_model

SHARE = 0.05
HIDDEN = 512
CARDS = {"H200": (4.8e12, 989e12, 141e9), "A100-80GB": (2.0e12, 312e12, 80e9)}
"""Bytes a second, dense fp16 operations a second, and bytes of memory, from the data sheets."""

REACHED = gpu_model.BANDWIDTH_REACHED
"""The share of both that a prediction assumes."""

LAUNCH = gpu_model.LAUNCH
"""Seconds that a kernel in a CUDA graph is assumed to cost besides its bytes."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder."""

    name: str
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        heads = 2 * self.query_heads + 2 * self.kv_heads
        return self.width * heads * self.head_dim + 3 * self.width * self.inner

    @property
    def weights(self) -> int:
        """Numbers that a decode step reads: the matrices, and the output's."""
        return self.layers * self.layer_weights + self.width * self.vocabulary


SHAPES = {
    "llama-2-7b": Shape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3-8b": Shape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
}


@dataclass(frozen=True)
class Count:
    """Bytes that go through memory and operations, of one decode step of the whole model."""

    bytes: int
    operations: int
    kernels: int


def count_model(shape: Shape, batch: int) -> Count:
    """The decoder besides its attention: every weight once, two operations a weight and row."""
    return Count(2 * shape.weights, 2 * shape.weights * batch, 10 * shape.layers)


def count_full(shape: Shape, batch: int, context: int) -> Count:
    """Attention over `context` tokens: every key and value once."""
    pairs = shape.layers * batch * shape.kv_heads * context
    operations = 4 * shape.layers * batch * shape.query_heads * context * shape.head_dim
    return Count(pairs * 2 * shape.head_dim * 2, operations, 2 * shape.layers)


def count_less(shape: Shape, batch: int, capacity: int, rank: int) -> Count:
    """H2O over `capacity` slots with a state of `rank`: kernels A and B of each layer.

    A slot's key, value and position, its score read twice and written once, each query head's
    logit written and read; H and z read and written; the maps' weights once for the batch.
    """
    group = shape.query_heads // shape.kv_heads
    heads = batch * shape.kv_heads
    slots = heads * capacity * (4 * shape.head_dim + 2 * 4 + 3 * 4 + group * 8)
    state = heads * rank * (shape.head_dim + 1) * 8
    pairs = heads * shape.head_dim * 2 * (2 + 2 + 2 + 2 * group)
    bytes_, operations = slots + state + pairs, 4 * heads * group * capacity * shape.head_dim
    if rank:
        mapped = shape.query_heads + shape.kv_heads
        weights = mapped * HIDDEN * (shape.head_dim + rank)
        bytes_ += 2 * weights + batch * mapped * rank * 8
        operations += 2 * batch * weights + 4 * heads * group * rank * shape.head_dim
    return Count(shape.layers * bytes_, shape.layers * operations, 2 * shape.layers)


def predict(card: str, *counts: Count) -> float:
    """Seconds of a step: the slower of memory and arithmetic at `REACHED`, and the launches."""
    bandwidth, arithmetic = (REACHED * number for number in CARDS[card][:2])
    memory = sum(count.bytes for count in counts) / bandwidth
    compute = sum(count.operations for count in counts) / arithmetic
    return max(memory, compute) + LAUNCH * sum(count.kernels for count in counts)


def predict_less(card: str, shape: Shape, batch: int, capacity: int, rank: int) -> float:
    """Seconds of a step with a LESS cache: the model's, and each layer's kernels by `gpu_model`."""
    group = shape.query_heads // shape.kv_heads
    layer = gpu_model.Step(batch, shape.kv_heads, group, capacity, rank)
    model = predict(card, count_model(shape, batch))
    return model + shape.layers * layer.seconds(gpu_model.CARDS[card])


def fits(card: str, shape: Shape, batch: int, context: int) -> bool:
    """Whether the weights and a full cache go into the card's memory."""
    needed = count_model(shape, batch).bytes + count_full(shape, batch, context).bytes
    return needed < CARDS[card][2]


def table(context: int) -> list[str]:
    """Lines of Markdown: a step's predicted time for each shape, batch and card."""
    lines = [
        "| shape | batch | card | full, ms | rank 0, ms | LESS, ms | full / LESS | LESS / rank 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    slots = round(SHARE * context)
    for shape in SHAPES.values():
        for batch in (1, 16, 48, 64):
            for card in CARDS:
                model = count_model(shape, batch)
                full = predict(card, model, count_full(shape, batch, context))
                sparse = predict_less(card, shape, batch, slots, 0)
                less = predict_less(card, shape, batch, slots, 8)
                note = "" if fits(card, shape, batch, context) else " (does not fit)"
                lines.append(
                    f"| {shape.name} | {batch} | {card} | {1e3 * full:.1f}{note} | "
                    f"{1e3 * sparse:.2f} | {1e3 * less:.2f} | {full / less:.1f} | "
                    f"{less / sparse:.3f} |"
                )
    return lines


def main() -> int:
    for context in (4096, 16384):
        print(f"Context {context}, C = {round(SHARE * context)}:\n")
        print("\n".join(table(context)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
