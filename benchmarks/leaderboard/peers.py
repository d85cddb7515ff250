"""The caches of kvpress and of transformers, as data: what runs them is `kvpress_worker`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .protocol import Plan, pairs_of

PAIR_BYTES = 256
"""A pair of the reference model's heads, 2 x 64 numbers of 16 bits."""
CODED_PAIR_BYTES = 72
"""The same in optimum-quanto's 4 bits: codes, and a scale and a shift for 64 numbers."""
HEADS = 24
ONCE = (
    "SnapKV",
    "ObservedAttention",
    "StreamingLLM",
    "TOVA",
    "ExpectedAttention",
    "Knorm",
    "PyramidKV",
    "AdaKV, ExpectedAttention",
)
"""Presses that compress after the prompt; then the cache grows."""
DECODING = ("SnapKV", "StreamingLLM", "TOVA", "Knorm")
"""Those that can also compress every so many steps, and so stay within their bytes.

ExpectedAttention is not among them: it judges by the queries since the last compression, and so few
bytes leave too few of them.
"""
SINKS = 4


def entries(plan: Plan) -> Iterator[dict[str, Any]]:
    """What is measured in the peers' environment: the full cache first, what takes longest last."""
    yield {"name": "full cache, peers' environment", "share": ""}
    for share in plan.budgets:
        slots = pairs_of(plan.budgets[share], HEADS, PAIR_BYTES)
        for press in ONCE:
            yield {
                "name": f"kvpress {press}, once",
                "share": share,
                "press": press,
                "pairs": slots,
                "options": _options(press, slots),
            }
        for press in DECODING:
            # So many pairs are added before the next compression: they are a part of the bytes.
            interval = 1 if press in ("StreamingLLM", "TOVA", "Knorm") else slots // 4
            kept = slots - interval
            later = _options(press, kept)
            if "window_size" in later:
                later["window_size"] = interval - 1
            yield {
                "name": f"kvpress {press}, decoding",
                "share": share,
                "press": press,
                "pairs": kept,
                "options": _options(press, kept),
                "interval": interval,
                "later": later,
            }
    for share in plan.budgets:
        kept = pairs_of(plan.budgets[share], HEADS, CODED_PAIR_BYTES)
        yield {
            "name": "kvpress SnapKV, once, over QuantizedCache, 4 bits",
            "share": share,
            "press": "SnapKV",
            "pairs": kept,
            "options": _options("SnapKV", kept),
            "bits": 4,
        }
    for bits in (4, 2):
        yield {"name": f"QuantizedCache, {bits} bits", "share": "", "bits": bits}


def _options(press: str, slots: int) -> dict[str, Any]:
    """A press's fields where its defaults do not go with so few pairs."""
    own = press.rpartition(", ")[2]
    if own in ("SnapKV", "PyramidKV"):
        # The default, 64 tokens that are always kept, leaves no room to choose.
        return {"window_size": min(64, max(1, slots // 3))}
    if own in ("StreamingLLM", "ExpectedAttention"):
        return {"n_sink": min(SINKS, slots // 2)}
    return {}
