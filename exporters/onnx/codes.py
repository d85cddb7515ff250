"""Codes of quantised pairs in standard operators: encoding, decoding, and products with them.

Bytes become floats x, and field i of w bits is ``floor(x / 2^(i w)) - 2^w floor(x / 2^(i w + w))``,
which is exact. ONNX Runtime does that faster than shifts of bytes, look-ups or products of integers
(see ``benchmarks/onnx_codes.py``), and TensorRT's parser knows no shifts.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from less_cache.quantization.codes import LARGEST_SCALE, SCALE_DTYPE
from less_cache.quantization.layout import CodeLayout, Plane

from .building import Builder, Value


def encode(b: Builder, layout: CodeLayout, u: Value, wide: str, kind: str) -> tuple[Value, Value]:
    """Codes [B, Hkv, S, nbytes] and scales [B, Hkv, S] of numbers [B, Hkv, S, D].

    As `less_cache.quantization.codes.encode` gives them.

    Parameters
    ----------
    b
        Gets the nodes.
    layout
        Of the channels.
    u
        Of the dtype `wide`.
    wide
        The dtype of computing.
    kind
        That of the bytes.
    """
    stored, last = layout.stored, b.ints(3)
    if stored < len(layout.bits):
        u = b("Slice", u, b.ints(0), b.ints(stored), last)
    zero, one = b.constant(0, wide), b.constant(1, wide)
    weighted = b("Mul", u, b.constant(layout.steps[:stored], wide))
    # The largest number comes out first, so that no square overflows or vanishes.
    largest = b("ReduceMax", b("Abs", weighted), last)
    ratio = b("Div", weighted, b("Where", b("Greater", largest, zero), largest, one))
    mean = b("ReduceMean", b("Mul", ratio, ratio), last)
    scales = b("Min", b("Mul", b("Sqrt", mean), largest), b.constant(LARGEST_SCALE, wide))
    scales = b.cast(scales, SCALE_DTYPE)
    read = b.cast(scales, wide)
    # A scale of 0 reads as 0 whatever the codes are.
    divisor = b("Where", b("Greater", read, zero), read, one)
    codes = b("Add", b("Div", u, divisor), b.constant(layout.centers[:stored], wide))
    codes = b("Min", b("Round", codes), b.constant(layout.highest[:stored], wide))
    return _pack(b, layout, b("Max", codes, zero), wide, kind), b("Squeeze", scales, last)


def decode(b: Builder, layout: CodeLayout, codes: Value, scales: Value, wide: str) -> Value:
    """Numbers [B, Hkv, N, D] of bytes [B, Hkv, N, nbytes] and scales [B, Hkv, N]."""
    found: dict[int, Value] = {}
    for plane in layout.planes:
        fields = _fields(b, layout, plane, codes, wide)
        part = fields[0] if len(fields) == 1 else b("Concat", *fields, axis=3)
        if plane.channels < plane.nbytes * len(fields):
            part = b("Slice", part, b.ints(0), b.ints(plane.channels), b.ints(3))
        if plane.shift:
            part = b("Mul", part, b.constant(2.0**plane.shift, wide))
            part = b("Add", found[plane.first], part)
        found[plane.first] = part
    levels = _joined(b, list(found.values()))
    levels = b("Sub", levels, b.constant(layout.centers[: layout.stored], wide))
    numbers = b("Mul", levels, b.unsqueeze(b.cast(scales, wide), 3))
    missing = len(layout.bits) - layout.stored
    return b("Pad", numbers, b.ints(*[0] * 7, missing)) if missing else numbers


def products(b: Builder, layout: CodeLayout, q: Value, codes: Value, wide: str) -> Value:
    """Σ q (code - center), [B, Hkv, M, N], of queries [B, Hkv, M, D] with all codes.

    No key is put together: each field of the bytes meets the queries' channels that it holds.
    """
    parts = [field for plane in layout.planes for field in _fields(b, layout, plane, codes, wide)]
    spread = b("MatMul", q, b.constant(_places(layout), wide))
    sizes = [plane.nbytes for plane in layout.planes for _ in range(8 // plane.width)]
    shares = [spread]
    if len(parts) > 1:
        shares = b.many("Split", [spread, b.ints(*sizes)], len(parts), axis=3)
    total = b("MatMul", q, b.constant(-layout.centers[:, None], wide))
    for share, part in zip(shares, parts, strict=True):
        turned = b("Transpose", part, perm=[0, 1, 3, 2])
        total = b("Add", b("MatMul", share, turned), total)
    return total


def mixed(b: Builder, layout: CodeLayout, weights: Value, codes: Value, wide: str) -> Value:
    """Σ weight (code - center), [B, Hkv, M, D], of weights [B, Hkv, M, N] with all codes."""
    parts = [field for plane in layout.planes for field in _fields(b, layout, plane, codes, wide)]
    sums = _joined(b, [b("MatMul", weights, part) for part in parts])
    levels = b("MatMul", sums, b.constant(_places(layout).T, wide))
    total = b("ReduceSum", weights, b.ints(3))
    return b("Sub", levels, b("Mul", total, b.constant(layout.centers, wide)))


def _fields(b: Builder, layout: CodeLayout, plane: Plane, codes: Value, wide: str) -> list[Value]:
    """A plane's bits, [B, Hkv, N, nbytes] for each field of its bytes, from the lowest on."""
    if len(layout.planes) > 1:
        bounds = b.ints(plane.offset), b.ints(plane.offset + plane.nbytes)
        codes = b("Slice", codes, *bounds, b.ints(3))
    above = [b.cast(codes, wide)]
    for place in range(plane.width, 8, plane.width):
        shifted = b("Mul", above[0], b.constant(2.0**-place, wide))
        above.append(b("Floor", shifted))
    size = b.constant(2.0**plane.width, wide)
    fields = [b("Sub", low, b("Mul", high, size)) for low, high in pairwise(above)]
    return [*fields, above[-1]]


def _places(layout: CodeLayout) -> np.ndarray:
    """[D, fields of all planes]: to which fields each channel goes, and what they count for."""
    widths = [plane.nbytes * (8 // plane.width) for plane in layout.planes]
    places = np.zeros((len(layout.bits), sum(widths)))
    for plane, start in zip(layout.planes, np.cumsum([0, *widths]), strict=False):
        channel = np.arange(plane.channels)
        places[plane.first + channel, start + channel] = 2.0**plane.shift
    return places


def _pack(b: Builder, layout: CodeLayout, codes: Value, wide: str, kind: str) -> Value:
    """Bytes [..., nbytes] of codes [..., stored]: sums of integers, which are exact."""
    total = None
    for place, worth in _worths(layout).items():
        part = codes
        if place:
            part = b("Floor", b("Mul", codes, b.constant(2.0**-place, wide)))
        part = b("MatMul", part, b.constant(worth, wide))
        total = part if total is None else b("Add", total, part)
    if total is None:
        raise AssertionError("a layout without planes")
    return b.cast(total, kind)


def _worths(layout: CodeLayout) -> dict[int, np.ndarray]:
    """By shift: what the codes, shifted so far, count for in each byte, [stored, nbytes]."""
    worths: dict[int, np.ndarray] = {}
    for plane in layout.planes:
        channel = np.arange(plane.channels)
        row, column = plane.first + channel, plane.offset + channel % plane.nbytes
        worth = 2.0 ** (plane.width * (channel // plane.nbytes))
        # The plane's bits are what is above its place, less what is above its end.
        for place, factor in ((plane.shift, 1.0), (plane.shift + plane.width, -(2.0**plane.width))):
            if place < layout.bits[plane.first]:
                empty = np.zeros((layout.stored, layout.nbytes))
                worths.setdefault(place, empty)[row, column] += factor * worth
    return dict(sorted(worths.items()))


def _joined(b: Builder, parts: list[Value]) -> Value:
    return parts[0] if len(parts) == 1 else b("Concat", *parts, axis=3)
