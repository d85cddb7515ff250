"""A small model of a kernel's time: memory's bandwidth, its latency, and instructions.

No GPU is needed. It prints what it makes of published times, with its error, and what it predicts
of this library's decode kernels before and after their loads were kept under way::

    python -m benchmarks.gpu_model

A kernel's programs go through turns of loops. Its time is that of a launch, and the longest of

- its bytes at the bandwidth that is reached;
- the instructions of all programs of the busiest multiprocessor;
- the time that one program takes by itself, in which it waits for its loads, times as often as a
  multiprocessor has to begin anew because it has room for so many programs at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    Attributes
    ----------
    bandwidth
        Bytes a second.
    multiprocessors
    clock
        Cycles a second, boosted.
    operations
        Dense fp16 operations a second of all multiprocessors.
    """

    bandwidth: float
    multiprocessors: int
    clock: float
    operations: float


CARDS = {
    "H200": Card(4.8e12, 132, 1.98e9, 989e12),
    "A100-80GB": Card(2.039e12, 108, 1.41e9, 312e12),
}

BANDWIDTH_REACHED = 0.78
"""Of the data sheet's: what two published times of Flash-Decoding differ by."""

RATE_REACHED = 0.65
"""Of the peak rate of products, or of instructions: one published time of FlashAttention."""

LATENCY = 0.8e-6
"""Seconds from a load to its use while memory is busy: assumed, some twice that of idle memory."""

LAUNCH = 2e-6
"""Seconds of a kernel in a CUDA graph besides: assumed."""

ISSUED_A_CYCLE = 4
"""Instructions of as many warps, in a multiprocessor."""


@dataclass(frozen=True)
class Loop:
    """Turns of one loop of a program.

    Attributes
    ----------
    turns
    instructions
        Of one warp in a turn, by the compiler's report.
    waits
        Loads of a turn that wait for one another.
    under_way
        Turns whose loads are under way while one is computed; 0: each waits for its own.
    """

    turns: int
    instructions: int
    waits: int
    under_way: int = 0


@dataclass(frozen=True)
class Kernel:
    """What of a kernel its time depends on.

    Attributes
    ----------
    programs
        In all.
    warps
        Of a program.
    resident
        Programs that a multiprocessor has room for.
    loops
        One after another.
    bytes
        Of all programs.
    """

    programs: int
    warps: int
    resident: int
    loops: tuple[Loop, ...]
    bytes: float

    def parts(self, card: Card) -> dict[str, float]:
        """Seconds by which each of the three limits it."""
        rate = RATE_REACHED * card.clock
        busiest = math.ceil(self.programs / card.multiprocessors)
        together = max(1.0, self.warps / ISSUED_A_CYCLE)
        alone = 0.0
        for loop in self.loops:
            turn = loop.instructions * together / rate
            if loop.under_way:
                turn = max(turn, (LATENCY + turn) / (loop.under_way + 1))
                alone += LATENCY
            else:
                turn += LATENCY * loop.waits
            alone += loop.turns * turn
        issued = sum(loop.turns * loop.instructions for loop in self.loops) * self.warps * busiest
        return {
            "bandwidth": self.bytes / (BANDWIDTH_REACHED * card.bandwidth),
            "instructions": issued / (ISSUED_A_CYCLE * rate),
            "latency": math.ceil(busiest / self.resident) * alone,
        }

    def seconds(self, card: Card) -> float:
        """Of the kernel in a CUDA graph."""
        return LAUNCH + max(self.parts(card).values())


PUBLISHED = {
    (256, 256): (390.5, 63.4),
    (128, 512): (366.3, 67.7),
    (64, 1024): (364.8, 77.7),
    (32, 2048): (352.0, 58.5),
    (16, 4096): (401.7, 57.0),
    (8, 8192): (529.2, 56.4),
    (4, 16384): (582.7, 58.2),
    (2, 32768): (1156.1, 60.3),
    (1, 65536): (2300.6, 64.4),
    (1, 131072): (4592.2, 106.6),
}
"""Microseconds of FlashAttention 2.0.9 and of Flash-Decoding on an A100, by batch and tokens.

16 query heads of 128, 2 key and value heads, fp16: the last table of "Flash-Decoding for
long-context inference" (T. Dao, D. Haziza, F. Massa, G. Sizov), pytorch.org/blog/flash-decoding,
2023-10-13.
"""

QUERY_HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
BLOCK_M, BLOCK_N = 128, 64
"""Queries and keys in a tile of FlashAttention: of the queries one is real."""

EAGER = 22e-6
"""Seconds that Flash-Decoding takes besides its bytes: two kernels, launched one by one."""


def flash_attention(batch: int, tokens: int, card: Card) -> float:
    """A program for each query head: its products alone, on the busiest multiprocessor."""
    products = 4 * BLOCK_M * BLOCK_N * HEAD_DIM
    turn = products * card.multiprocessors / (RATE_REACHED * card.operations)
    busiest = math.ceil(batch * QUERY_HEADS / card.multiprocessors)
    return busiest * math.ceil(tokens / BLOCK_N) * turn


def flash_decoding(batch: int, tokens: int, card: Card) -> float:
    """Programs enough for the whole card: its bytes alone."""
    moved = batch * tokens * KV_HEADS * HEAD_DIM * 2 * 2
    return EAGER + moved / (BANDWIDTH_REACHED * card.bandwidth)


def errors() -> list[tuple[int, int, float, float, float, float]]:
    """Batch, tokens, and microseconds predicted and the error of both kernels, published as 1."""
    card, found = CARDS["A100-80GB"], []
    for (batch, tokens), (attention, decoding) in PUBLISHED.items():
        first = flash_attention(batch, tokens, card) * 1e6
        second = flash_decoding(batch, tokens, card) * 1e6
        found.append((batch, tokens, first, first / attention - 1, second, second / decoding - 1))
    return found


@dataclass(frozen=True)
class Step:
    """A decode step of one layer: H2O, D = 128, fp16, hidden 512.

    Instructions, and programs that a multiprocessor has room for, are the compiler's for sm_90.
    `before` is as the kernels were when masks came from positions, heads were shared out for two
    programs a multiprocessor, and each warp repeated the maps' products.
    """

    batch: int
    kv_heads: int
    group: int
    capacity: int
    rank: int
    before: bool = False

    @property
    def heads(self) -> int:
        """KV heads of all sequences."""
        return self.batch * self.kv_heads

    def kernels(self, card: Card) -> dict[str, Kernel]:
        """What is launched, by name."""
        heads, before = self.heads, self.before
        blocks = math.ceil(self.capacity / 32)
        if before:
            splits = min(math.ceil(2 * card.multiprocessors / heads), blocks // 8)
        else:
            splits = min(4 * card.multiprocessors // heads, blocks // 4, 16)
        turns = math.ceil(blocks / max(1, splits))
        splits = math.ceil(blocks / turns)
        over_slots = Loop(turns, *((BEFORE_SLOTS, 2) if before else (AFTER_SLOTS, 1, 2)))
        scored = 256 if before or splits == 1 else 1024
        # Addresses, the victim's place, its value, H and z; then each score and logit.
        ends = (
            Loop(1, 1200, 5),
            Loop(math.ceil(self.capacity / scored), 60 * scored // 256, 1 + self.group),
        )
        read = heads * self.capacity * (512 + 4 + 4 * self.group)
        rest = heads * self.capacity * (8 + 4 * self.group)
        rest += heads * (self.rank * 129 * 8 + 128 * 2 * (6 + 2 * self.group))
        found = self._first()
        if splits == 1:
            loops = (Loop(1, 100, 3), over_slots, *ends)
            return found | {"attend": Kernel(heads, 4, 4, loops, read + rest)}
        parts = 2.0 * heads * splits * 16 * 128 * 4
        found["attend"] = Kernel(heads * splits, 4, 4, (Loop(1, 400, 3), over_slots), read)
        merged = Loop(splits, 70, 1, 0 if before else 2)
        found["conclude_split"] = Kernel(
            heads, 4, 4, (Loop(1, 100, 3), merged, *ends), rest + parts
        )
        return found

    def _first(self) -> dict[str, Kernel]:
        """Kernel A, whose longest programs look for victims and map their keys; or two kernels."""
        if not self.rank:
            return {"select": self._scan()}
        if self.before or self.capacity <= MOST_SCANNED:
            return {"select_and_map": self._maps(scans=True)}
        return {"select": self._scan(), "map": self._maps(scans=False)}

    def _scan(self) -> Kernel:
        """What only chooses victims: one sequence a program."""
        slots, instructions = SCAN[1]
        scan = Loop(math.ceil(self.capacity / slots), instructions, 1, 0 if self.before else 2)
        # By registers: 56 of a thread.
        loops = (Loop(1, 150, 3), scan)
        return Kernel(self.heads, 4, 9, loops, self.heads * self.capacity * 8.0)

    def _maps(self, *, scans: bool) -> Kernel:
        """What applies the maps, and chooses victims if it `scans`."""
        tile = 16 if self.batch <= 16 else 32
        units = self.kv_heads * (1 + self.group)
        maps = Loop(8, BEFORE_MAPS, 1) if self.before else Loop(4, AFTER_MAPS, 1, 1)
        loops: tuple[Loop, ...] = (Loop(1, 150, 3), maps, Loop(1, 300, 2))
        moved = 2.0 * units * 512 * (128 + self.rank)
        if scans:
            slots, instructions = SCAN[tile]
            turns = math.ceil(self.capacity / slots)
            loops = (*loops, Loop(turns, instructions, 1, 0 if self.before else 2))
            moved += self.heads * self.capacity * 8.0
        # By the memory that they share.
        resident = 1 if scans and not self.before else 2
        return Kernel(units * math.ceil(self.batch / tile), 8, resident, loops, moved)

    def seconds(self, card: Card) -> float:
        """All of them in a CUDA graph."""
        return sum(kernel.seconds(card) for kernel in self.kernels(card).values())

    @property
    def bytes(self) -> float:
        """That have to go through memory, however it is done."""
        slots = self.heads * self.capacity * (532 + 8 * self.group)
        state = self.heads * (self.rank * 129 * 8 + 256 * (6 + 2 * self.group))
        units = self.kv_heads * (1 + self.group) if self.rank else 0
        return slots + state + 2.0 * units * 512 * (128 + self.rank)


BEFORE_SLOTS, AFTER_SLOTS = 292, 311
"""Instructions of a warp for 32 slots in `attend`."""

BEFORE_MAPS, AFTER_MAPS = 1212, 643
"""The same for 64, and for 128, hidden numbers of 32 sequences in `select_and_map`."""

MOST_SCANNED = 512
"""Slots of a head up to which one kernel looks for victims and applies the maps."""

SCAN = {1: (512, 270), 16: (128, 408), 32: (32, 261)}
"""By the sequences of its tile, the slots of a turn of kernel A's scan for victims, and its
instructions of a warp. What only chooses victims has one sequence a program, and four warps."""

FIRST = ("select", "map", "select_and_map")
"""Kernel A, in one launch or in two."""

SHAPES = {"llama-2-7b": (32, 1), "llama-3-8b": (8, 4)}


def predictions(card: Card) -> list[str]:
    """Lines of Markdown: microseconds of a layer's step, before and after, and what limits it."""
    lines = [
        "| shape | batch | C | before | after | of it A | and B | of bandwidth | LESS / rank 0 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, shape), batch, capacity in itertools.product(
        SHAPES.items(), (1, 16, 64), (205, 819, 8192)
    ):
        old, new = (Step(batch, *shape, capacity, 8, before=x) for x in (True, False))
        sparse = dataclasses.replace(new, rank=0)
        times = {kernel: one.seconds(card) for kernel, one in new.kernels(card).items()}
        first = sum(times.pop(name, 0.0) for name in FIRST)
        kernel = new.kernels(card)["attend"]
        limits = kernel.parts(card)
        limit = max(limits, key=lambda part: limits[part])
        spent = new.seconds(card)
        lines.append(
            f"| {name} | {batch} | {capacity} | {1e6 * old.seconds(card):.0f} | {1e6 * spent:.0f} "
            f"| {1e6 * first:.0f} | {1e6 * sum(times.values()):.0f} ({limit}) "
            f"| {100 * new.bytes / spent / card.bandwidth:.0f} % "
            f"| {spent / sparse.seconds(card):.2f} |"
        )
    return lines


def scans(card: Card) -> list[str]:
    """Lines of Markdown: microseconds of kernel A, and the share of its scan for victims."""
    lines = [
        "| shape | batch | C | in one launch | as built | victim known "
        "| of the cache's step the scan takes, in one launch | as built |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, shape), batch, capacity in itertools.product(
        SHAPES.items(), (1, 16, 64), (205, 819, 8192)
    ):
        step = Step(batch, *shape, capacity, 8)
        known = step._maps(scans=False).seconds(card)
        together = step._maps(scans=True).seconds(card)
        built = sum(kernel.seconds(card) for kernel in step._first().values())
        rest = step.seconds(card) - built
        shares = (100 * (spent - known) / (rest + spent) for spent in (together, built))
        times = " | ".join(f"{1e6 * spent:.1f}" for spent in (together, built, known))
        percents = " | ".join(f"{share:.0f} %" for share in shares)
        lines.append(f"| {name} | {batch} | {capacity} | {times} | {percents} |")
    return lines


def main() -> int:
    print("Published times on an A100, microseconds, and what the model makes of them:\n")
    print(
        "| batch | tokens | FlashAttention 2.0.9 | model | error | Flash-Decoding | model | error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for batch, tokens, first, off, second, other in errors():
        published = PUBLISHED[batch, tokens]
        print(
            f"| {batch} | {tokens} | {published[0]} | {first:.0f} | {100 * off:+.0f} % "
            f"| {published[1]} | {second:.0f} | {100 * other:+.0f} % |"
        )
    for place, name in ((3, "FlashAttention"), (5, "Flash-Decoding")):
        off = [abs(row[place]) for row in errors()]
        print(f"\n{name}: {100 * sum(off) / len(off):.0f} % mean, {100 * max(off):.0f} % at most")
    for name, card in CARDS.items():
        print(f"\nOne layer's step, H2O, fp16, predicted on {name}, microseconds:\n")
        print("\n".join(predictions(card)))
        print(f"\nKernel A of it, predicted on {name}, microseconds:\n")
        print("\n".join(scans(card)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
