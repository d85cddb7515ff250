"""Compile every kernel variant the library would launch, for GPUs that are not here.

The library's own launch code runs on tensors without data (torch's meta device); what it would
have launched is compiled down to machine code for sm_80, sm_90 and sm_100, and the resources are
read from the compiler's report::

    python -m less_cache.backends.triton.aot.compile_gate          # a selection, as the tests do
    python -m less_cache.backends.triton.aot.compile_gate --all    # the whole matrix
    python -m less_cache.backends.triton.aot.compile_gate --codes  # coded pairs of all widths
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from ..launch import Launch, recording
from .compiling import compile_kernel, signature
from .variants import (
    Variant,
    coded_variants,
    every_variant,
    few_variants,
    launches_of,
    selected_variants,
)

CAPABILITIES = (80, 90, 100)
SPILL_FREE_HEAD_DIM = 128
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may take."""

PRODUCT = re.compile(r"\btt\.dot\b|warp_group_dot\b|tc_gen5_mma\b")
"""A matrix product, as the compiler writes it for one GPU or another."""

PIPELINED = ("attend", "attend_chunk", "sum_columns")
"""Kernels whose loop reads the cache, or a prompt: all their time is in it."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes, by the compiler's own report."""

    kernel: str
    variant: str
    capability: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    loop: int
    """of `instructions`, those of the loop that has most matrix products"""
    tile: int
    """slots that a turn of that loop takes in; 0 where there are none"""
    copies: int
    """asynchronous copies into shared memory that a turn of that loop begins"""
    under_way: int
    """groups of loads that a loop leaves under way where it waits for one; 0: it waits for all"""
    ahead: int
    """loads of that loop whose numbers the next turn takes, and no other"""
    waited_for: int
    """loads of that loop whose numbers the same turn takes: all of it waits for them"""


def compile_launch(wanted: Launch, capability: int, variant: str = "") -> Resources:
    """Compile one launch for one GPU and read what it takes.

    Parameters
    ----------
    wanted
        From `recording`.
    capability
        80, 90 or 100.
    variant
        A name for the report.

    Raises
    ------
    RuntimeError
        If it runs under the interpreter, which has no compiler.
    """
    compiled = compile_kernel(wanted, signature(wanted), capability)
    registers, spilled = read_usage(compiled.asm["cubin"])
    instructions, loop = count_instructions(compiled.asm["cubin"])
    copies, ahead, waited_for = loads_of_a_turn(compiled.asm["ttgir"])
    return Resources(
        kernel=wanted.kernel.__name__,
        variant=variant,
        capability=capability,
        warps=wanted.warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        instructions=instructions,
        loop=loop,
        tile=wanted.constants.get("BLOCK_C", 0) if wanted.kernel.__name__ == "attend" else 0,
        copies=copies,
        under_way=loads_under_way(compiled.asm["ptx"]),
        ahead=ahead,
        waited_for=waited_for,
    )


def compile_all(
    variants: list[Variant], capabilities: tuple[int, ...], processes: int
) -> Iterator[Resources]:
    """Compile all variants for all GPUs, kernels that several share only once each."""
    jobs: list[tuple[Variant, int, tuple[int, ...]]] = []
    known = set()
    for variant in variants:
        with recording() as launches:
            launches_of(variant)
        fresh = []
        for index, wanted in enumerate(launches):
            key = repr((wanted.kernel.__name__, wanted.options, signature(wanted)))
            if key not in known:
                known.add(key)
                fresh.append(index)
        jobs += [(variant, capability, tuple(fresh)) for capability in capabilities if fresh]
    with ProcessPoolExecutor(processes) as pool:
        for found in pool.map(_compile_job, jobs):
            yield from found


def loads_under_way(ptx: str) -> int:
    """N, the most groups of asynchronous copies that any wait leaves under way.

    A pipelined loop waits for the oldest of its copies and computes while the others come. Where
    loads depend on each other the compiler gives up, and every wait is for all: N = 0.
    """
    waits = re.findall(r"cp\.async(?:\.bulk)?\.wait_group(?:\.read)?\s+(\d+)", ptx)
    return max(map(int, waits), default=0)


def loads_of_a_turn(ttgir: str) -> tuple[int, int, int]:
    """What the innermost loop that has most matrix products loads.

    Returns
    -------
    tuple of int
        Asynchronous copies into shared memory; loads into registers that the next turn takes; and
        such that the same turn takes.
    """
    lines = ttgir.splitlines()
    loops = [_indented(lines, place) for place, line in enumerate(lines) if "scf.for" in line]
    innermost = [body for body in loops if not any("scf.for" in one for one in body)]
    main = max(innermost, key=lambda body: len(PRODUCT.findall("\n".join(body))), default=[])
    inner = "\n".join(one for one in main if not one.lstrip().startswith("scf.yield"))
    loaded = re.findall(r"(%\w+)(?::\d+)? = tt\.load\b", inner)
    taken = [name for name in loaded if len(re.findall(re.escape(name) + r"\b", inner)) > 1]
    copies = len(re.findall(r"async_\w*copy_global_to_local\b", inner))
    return copies, len(loaded) - len(taken), len(taken)


def _indented(lines: list[str], place: int) -> list[str]:
    """The lines that follow one and are indented further."""
    margin = len(lines[place]) - len(lines[place].lstrip())
    found = []
    for line in lines[place + 1 :]:
        if line.strip() and len(line) - len(line.lstrip()) <= margin:
            break
        found.append(line)
    return found


def problems(found: Resources, head_dim: int) -> list[str]:
    """What is not as it must be.

    Registers spilled at usual head sizes, too much shared memory, or a loop over keys and values
    that waits in each turn for what it has only begun to load.
    """
    wrong = []
    if found.kernel in PIPELINED and not (found.under_way if found.copies else found.ahead):
        wrong.append("no load is under way while the loop computes")
    if found.kernel in PIPELINED and found.waited_for:
        wrong.append(f"each turn waits for {found.waited_for} loads of its own")
    if head_dim <= SPILL_FREE_HEAD_DIM and found.spilled_bytes:
        wrong.append(f"{found.spilled_bytes} bytes of registers spilled")
    if found.shared_bytes > SHARED_LIMITS[found.capability]:
        wrong.append(f"{found.shared_bytes} bytes of shared memory")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Compile, print one line a kernel, and return 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole matrix, not a selection")
    parser.add_argument("--codes", action="store_true", help="coded pairs alone, in all widths")
    parser.add_argument("--few", action="store_true", help="the usual kernels and a coded one's")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--json", type=Path, help="also write the report there")
    options = parser.parse_args(arguments)
    variants = every_variant() if options.all else selected_variants()
    if options.codes:
        variants = coded_variants()
    if options.few:
        variants = few_variants()
    head_dims = {str(variant): variant.head_dim for variant in variants}
    capabilities = tuple(options.capability or CAPABILITIES)
    start = time.monotonic()
    report, failed = [], 0
    for found in compile_all(variants, capabilities, options.processes):
        wrong = problems(found, head_dims[found.variant])
        failed += bool(wrong)
        report.append(asdict(found))
        print(
            f"{found.kernel:16} sm_{found.capability:<4} registers {found.registers:3} "
            f"spilled {found.spilled_bytes:5} shared {found.shared_bytes:6} "
            f"instructions {found.instructions:5} loop {found.loop:4} tile {found.tile:3} "
            f"copies {found.copies} under way {found.under_way} ahead {found.ahead} "
            f"waited for {found.waited_for} "
            f"{found.variant} {'; '.join(wrong)}",
            flush=True,
        )
    print(f"{len(report)} kernels, {failed} wrong, {time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed > 0)


def _compile_job(job: tuple[Variant, int, tuple[int, ...]]) -> list[Resources]:
    variant, capability, wanted = job
    with recording() as launches:
        launches_of(variant)
    return [compile_launch(launches[i], capability, str(variant)) for i in wanted]


def read_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, which is where spilled registers go."""
    text = _tool("cuobjdump", "--dump-resource-usage", cubin)
    numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def count_instructions(cubin: bytes) -> tuple[int, int]:
    """A kernel's instructions, and those of its loop that has most matrix products (0: none)."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in _tool("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    bodies = [
        code[labels[to] : index + 1]
        for index, text in enumerate(code)
        for to in re.findall(r"\bBRA.*?(\.L_\w+)", text)
        if labels.get(to, index) < index
    ]
    products = {len(body): sum("MMA" in text for text in body) for body in bodies}
    loop = max(products, key=lambda size: products[size], default=0)
    return len(code), loop if products.get(loop) else 0


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton says of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
