"""Where codes lie in a pair's bytes, as compile-time constants of a kernel.

A kernel is given a text: ``"2+1x128"`` are 128 channels with planes of 2 bits and of 1, and
``"4x64 2x64"`` are two segments of 64 channels; ``""``: pairs are stored as they are.

Kernels read a segment in an order of their own, in which unpacking moves nothing. Of each byte of
the low plane come its fields side by side: place p is field p % F of byte p // F, and so channel
``p % F * bytes + p // F`` of the segment. Bytes are padded to a power of two.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton

from ....quantization.layout import GAUSSIAN_STEPS, CodeLayout

SMALLEST_DOT = 16
"""What a matrix product is long, at least."""


@dataclass(frozen=True)
class Segment:
    """Channels side by side that have as many bits: one plane, or a low and a high one."""

    first: int
    channels: int
    low_width: int
    low_offset: int
    low_bytes: int
    high_width: int
    high_offset: int
    high_bytes: int

    @property
    def fields(self) -> int:
        """F, codes in a byte of the low plane."""
        return 8 // self.low_width

    @property
    def padded_bytes(self) -> int:
        """Bytes of the low plane that are loaded at a time, a power of two."""
        return max(SMALLEST_DOT // self.fields, 1 << (self.low_bytes - 1).bit_length())

    @property
    def padded_high_bytes(self) -> int:
        """The same of the high plane."""
        return 1 << (self.high_bytes - 1).bit_length()

    @property
    def places(self) -> int:
        """Places of the segment in the order in which it is read."""
        return self.fields * self.padded_bytes

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.low_width + self.high_width

    @property
    def center(self) -> float:
        """The code that stands for 0."""
        return (2.0**self.bits - 1) / 2

    @property
    def step(self) -> float:
        """A Gaussian channel's step."""
        return GAUSSIAN_STEPS[self.bits]


def codes_text(layout: CodeLayout | None) -> str:
    """The text that tells a kernel of a layout."""
    if layout is None:
        return ""
    channels: dict[int, int] = {}
    widths: dict[int, list[str]] = {}
    for plane in layout.planes:
        channels[plane.first] = plane.channels
        widths.setdefault(plane.first, []).append(str(plane.width))
    return " ".join(f"{'+'.join(widths[first])}x{channels[first]}" for first in channels)


@functools.cache
def read_text(codes: str) -> tuple[Segment, ...]:
    """What `codes_text` wrote."""
    found: list[Segment] = []
    first = offset = 0
    for part in codes.split():
        widths, _, count = part.partition("x")
        channels = int(count)
        low, *others = (int(width) for width in widths.split("+"))
        high = others[0] if others else 0
        low_bytes, high_bytes = (-(-channels * width // 8) for width in (low, high))
        found.append(
            Segment(first, channels, low, offset, low_bytes, high, offset + low_bytes, high_bytes)
        )
        first, offset = first + channels, offset + low_bytes + high_bytes
    return tuple(found)


class Codes:
    """A text that has been read: a type, as Triton lets its functions call no others."""

    def __init__(self, text: str) -> None:
        self.segments = read_text(text)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def segments(codes: str) -> int:
    """How many segments there are."""
    return len(Codes(codes).segments)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def segment(codes: str, i: int, name: str) -> int | float:
    """What `Segment` says of one of them."""
    found: int | float = getattr(Codes(codes).segments[i], name)
    return found


@triton.constexpr_function  # type: ignore[untyped-decorator]
def pair_numbers(codes: str, head_dim: int) -> int:
    """Bytes of one pair's codes; where there are none, its D numbers."""
    if not codes:
        return head_dim
    last = Codes(codes).segments[-1]
    return last.high_offset + last.high_bytes


@triton.constexpr_function  # type: ignore[untyped-decorator]
def stored_channels(codes: str, head_dim: int) -> int:
    """How many channels are stored: the first ones."""
    if not codes:
        return head_dim
    last = Codes(codes).segments[-1]
    return last.first + last.channels
