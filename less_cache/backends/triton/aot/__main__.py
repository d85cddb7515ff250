"""Compile the decode step's kernels ahead of time, for programs that have no Triton.

::

    python -m less_cache.backends.triton.aot --arch 80,86,89,90,100,120
    python -m less_cache.backends.triton.aot --out kernels --arch 90 --export my-exported-model

The first makes the usual kinds of caches, the second those that an exported model has; either
needs no GPU. The folder gets ``kernels.bin``, the machine code of all kernels; ``kernels.json``,
which says where each lies, what it serves and which parameters it takes; and ``kernels.inc``, the
same as C++ initialisers, which the TensorRT plugin is built from. Started again it goes on where
it was stopped: Triton keeps what it compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import triton
from tqdm import tqdm

from ...._files import replaced, write_text
from ..launch import INTERPRETED
from .layouts import LAYOUTS, Layout, layouts_of_export
from .records import Image, compile_layout, initialiser

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PTX_ARCHITECTURE = 80
"""What Triton compiles for 90 and later runs on nothing else, neither code nor PTX."""

FORMAT = 4
ALIGNMENT = 64
"""Each image begins at a multiple of so many bytes."""


def compile_all(
    layouts: Iterable[Layout], architectures: Iterable[int], processes: int = 1
) -> list[Image]:
    """Compile what caches of these layouts launch in a decode step.

    Parameters
    ----------
    layouts
        Kinds of caches.
    architectures
        Of `ARCHITECTURES`. PTX, which other GPUs compile for themselves, is always made.
    processes
        That compile at a time.

    Returns
    -------
    list of Image
        Each once, though several layouts use it.

    Raises
    ------
    RuntimeError
        If it runs under Triton's interpreter, which has no compiler.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, but the compiler needs it unset")
    chosen = {*architectures}
    jobs = [
        (layout, arch, arch in chosen, arch == PTX_ARCHITECTURE)
        for layout in layouts
        for arch in sorted({*chosen, PTX_ARCHITECTURE})
    ]
    found: dict[object, Image] = {}
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(_compile_job, jobs)
        for images in tqdm(results, total=len(jobs), desc="kernels", unit="layout"):
            for image in images:
                found.setdefault(image.record, image)
    return list(found.values())


def write(images: Iterable[Image], folder: Path) -> None:
    """Write ``kernels.bin``, ``kernels.inc`` and ``kernels.json``, the index last."""
    blob = bytearray()
    records = []
    for image in images:
        blob += bytes(-len(blob) % ALIGNMENT)
        records.append(replace(image.record, offset=len(blob), size=len(image.code)))
        blob += image.code
    with replaced(folder / "kernels.bin") as path:
        path.write_bytes(blob)
    write_text(folder / "kernels.inc", "".join(initialiser(record) for record in records))
    index = {
        "format": FORMAT,
        "triton": triton.__version__,
        "kernels": [record.to_dict() for record in records],
    }
    write_text(folder / "kernels.json", json.dumps(index, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Compile, write, and print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/kernels"),
        help="the folder to write (default: %(default)s)",
    )
    parser.add_argument(
        "--arch",
        type=_architectures,
        default=ARCHITECTURES,
        help="compute capabilities with commas between them (default: all of %(default)s)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="only what this exported model's layers need; may be given several times",
    )
    parser.add_argument(
        "--layouts", choices=LAYOUTS, default="usual", help="which kinds of cache to compile for"
    )
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    layouts: list[Layout] = []
    for folder in options.export or ():
        layouts += layouts_of_export(folder)
    if options.export is None:
        layouts += LAYOUTS[options.layouts]()
    images = compile_all(dict.fromkeys(layouts), options.arch, options.processes)
    write(images, options.out)
    size = (options.out / "kernels.bin").stat().st_size
    print(f"{len(images)} kernels, {size / 2**20:.1f} MB: {options.out}")
    return 0


def _architectures(text: str) -> tuple[int, ...]:
    known = {str(arch): arch for arch in ARCHITECTURES}
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"got {', '.join(unknown)}, expected some of {', '.join(known)}"
        )
    return tuple(known[name] for name in names)


def _compile_job(job: tuple[Layout, int, bool, bool]) -> list[Image]:
    return compile_layout(*job)


if __name__ == "__main__":
    sys.exit(main())
