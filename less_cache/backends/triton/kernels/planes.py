"""Where codes lie in a pair's bytes, as compile-time constants of a kernel.

A kernel is given a text: ``"2+1x128"`` are 128 channels with planes of 2 bits and of 1, and
``"4x64 2x64"`` are two segments of 64 channels; ``""``: pairs are stored as they are.

Kernels read a segment in an order of their own, in which unpacking moves nothing between threads:
of each four bytes of the low plane first come the four fields 0, then the fields 1, and so on.
Field f of byte i is channel ``f * bytes + i`` of the segment. Bytes are padded to a power of two.
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
    def halved(self) -> bool:
        """Whether all fields of a byte have their high bits in one byte, if they have any."""
        return self.high_bytes in (0, self.low_bytes / 2)

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


class Assembly:
    """How four bytes become numbers in float16, two in a register, by two instructions or three.

    The bits of 1024 are put around a field: that is 1024 + code · 2^k where the field lies k bits
    up in its byte, and a subtraction leaves code · 2^k, exactly. Queries and outputs are multiplied
    by 2^-k. A compiler's own conversions of bytes run at an eighth of that rate.

    Attributes
    ----------
    text
        Takes four bytes of the low plane; where there is a high plane, of that, and 255 for each
        byte whose high bits must be shifted right by one width first. Gives two registers a field.
    constraints
        One a register: those given, then those taken.
    """

    def __init__(self, part: Segment) -> None:
        count = 2 * part.fields
        lines = [
            f"mov.b32 o, {twice(0x6400)};",
            f"prmt.b32 l0, ${count}, 0, 0x4140;",
            f"prmt.b32 l1, ${count}, 0, 0x4342;",
        ]
        if part.high_width:
            lines += [
                # What comes over from the next byte lies where no bit is wanted.
                f"shr.b32 t, ${count + 1}, {part.high_width};",
                f"lop3.b32 t, t, ${count + 1}, ${count + 2}, 0xE4;",
                "prmt.b32 h0, t, 0, 0x4140;",
                "prmt.b32 h1, t, 0, 0x4342;",
                f"shl.b32 h0, h0, {part.low_width};",
                f"shl.b32 h1, h1, {part.low_width};",
            ]
        for f in range(part.fields):
            place = f * part.low_width
            low = ((1 << part.low_width) - 1) << place
            high = ((1 << part.high_width) - 1) << place + part.low_width
            for half in range(2):
                lines.append(f"lop3.b32 t, l{half}, {twice(low)}, {twice(0x6400)}, 0xEA;")
                if part.high_width:
                    lines.append(f"lop3.b32 t, h{half}, {twice(high)}, t, 0xEA;")
                lines.append(f"sub.f16x2 ${2 * f + half}, t, o;")
        taken = 3 if part.high_width else 1
        self.text = "{ .reg .b32 l0, l1, h0, h1, t, o; " + " ".join(lines) + " }"
        self.constraints = ",".join(["=&r"] * count + ["r"] * taken)


def twice(half: int) -> str:
    """A constant of 16 bits in both halves of a register."""
    return f"0x{half << 16 | half:08X}"


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
def unpacking(codes: str, i: int) -> str:
    """PTX that makes four bytes of a segment 16-bit numbers: `Assembly` says how."""
    return Assembly(Codes(codes).segments[i]).text


@triton.constexpr_function  # type: ignore[untyped-decorator]
def operands(codes: str, i: int) -> str:
    """The constraints of `unpacking`."""
    return Assembly(Codes(codes).segments[i]).constraints


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
