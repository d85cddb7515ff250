"""A decode step over coded slots against float32 slots: as many of them, and as many bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

import less_cache as lc
from benchmarks.contestants import Less
from benchmarks.measuring import spread
from benchmarks.tables import for_a_page, for_terminal

if TYPE_CHECKING:
    from benchmarks.decode import Bench

HEADINGS = (
    *("batch", "slots", "bits", "float32 ms", "coded ms", "coded / float32"),
    *("slots in as many bytes", "their ms", "float32 MB", "coded MB"),
)


def measure_bits(
    bench: Bench, context: int, batch: int, bits: list[int], transform: str, backend: str
) -> list[dict[str, Any]]:
    """One row for each number of bits; all are timed in turns.

    Parameters
    ----------
    bench
        The model and the settings. The low-rank state is left out: it costs the same beside both.
    context, batch
        Of the sequences.
    bits
        Of keys and values alike.
    transform
        As of `Quantization`.
    backend
        That runs coded slots; float32 slots have ``"torch"``.
    """
    plain = bench.less(context, batch, 0)
    float_bytes = plain.config.layer(0).slot_bytes
    coded: dict[str, Less] = {}
    for width in bits:
        codes = lc.Quantization(width, width, transform)
        same = bench.less(context, batch, 0, quantization=codes, backend=backend)
        slots = same.config.layer(0).capacity * float_bytes // same.config.layer(0).slot_bytes
        coded[f"slots {width}"] = same
        coded[f"bytes {width}"] = bench.less(
            context, batch, 0, capacity=slots, quantization=codes, backend=backend
        )
    seconds = bench.time(
        {name: (entry, context) for name, entry in {"float32": plain, **coded}.items()},
        batch,
        bench.steps,
    )
    times = {name: spread(values) for name, values in seconds.items()}
    return [
        {
            "context": context,
            "batch": batch,
            "bits": width,
            "slots": plain.config.layer(0).capacity,
            "float32": times["float32"],
            "coded": times[f"slots {width}"],
            "ratio": times[f"slots {width}"]["median_ms"] / times["float32"]["median_ms"],
            "slots_in_as_many_bytes": coded[f"bytes {width}"].config.layer(0).capacity,
            "as_many_bytes": times[f"bytes {width}"],
            "float32_bytes": plain.nbytes,
            "coded_bytes": coded[f"slots {width}"].nbytes,
        }
        for width in bits
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, as text."""
    return [
        str(row["batch"]),
        f"{row['slots']:,}",
        str(row["bits"]),
        f"{row['float32']['median_ms']:.1f}",
        f"{row['coded']['median_ms']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['slots_in_as_many_bytes']:,}",
        f"{row['as_many_bytes']['median_ms']:.1f}",
        f"{row['float32_bytes'] / 1e6:.1f}",
        f"{row['coded_bytes'] / 1e6:.1f}",
    ]


def table(report: dict[str, Any]) -> Table:
    """For the terminal."""
    return for_terminal("One decode step, rank 0", HEADINGS, map(cells, report["results"]))


def markdown(report: dict[str, Any]) -> str:
    """For docs/benchmarks.md."""
    return "\n".join(for_a_page(HEADINGS, map(cells, report["results"])))
