"""How the codes of a head's channels lie in bytes, so that shifts alone unpack them.

Channels are sorted: those with more bits come first. Codes of 1, 2, 4 and 8 bits are packed as
they are; those of 3 and 6 bits as two planes, the low bits and the high bits. In a plane of n
channels with w bits each, byte i has channels i, i + m, i + 2m, ... with m = ceil(n w / 8):
unpacking is 8 / w shifts of whole runs of bytes, and nothing is interleaved.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .settings import Bits

GAUSSIAN_STEPS = {1: 1.595769, 2: 0.995687, 3: 0.586019, 4: 0.335201, 6: 0.104063, 8: 0.030763}
"""Steps of the uniform quantiser with the least mean squared error for N(0, 1), by bits."""

WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
"""The planes of a code, lowest bits first."""

PROFILES = {
    ("hadamard", 2): ((2, 8),),
    ("hadamard", 3): ((3, 8),),
    ("hadamard", 4): ((4, 8),),
    ("hadamard", 8): ((8, 8),),
    ("calibrated", 2): ((4, 2), (2, 4), (0, 2)),
    ("calibrated", 3): ((4, 4), (2, 4)),
    ("calibrated", 4): ((6, 2), (4, 4), (2, 2)),
    ("calibrated", 8): ((8, 8),),
}
"""(bits, eighths of the channels), most bits first."""


@dataclass(frozen=True)
class Plane:
    """Some bits of the codes of channels that lie side by side.

    Parameters
    ----------
    first, channels
        The first channel, and how many.
    width
        Bits of each: 1, 2, 4 or 8.
    shift
        By how much they are shifted in the code.
    offset, nbytes
        Where the plane lies in a pair's bytes.
    """

    first: int
    channels: int
    width: int
    shift: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class CodeLayout:
    """The codes of one key or value.

    Parameters
    ----------
    bits
        Of each channel, [D]; 0: the channel is not stored.
    planes
        Where they lie.
    nbytes
        Of a pair's codes.
    """

    bits: tuple[int, ...]
    planes: tuple[Plane, ...]
    nbytes: int

    @property
    def stored(self) -> int:
        """How many channels are stored: the first ones."""
        return sum(bits > 0 for bits in self.bits)

    @functools.cached_property
    def centers(self) -> np.ndarray:
        """[D], the code between the lowest and the highest: it stands for 0."""
        return np.array([(2**bits - 1) / 2 for bits in self.bits])

    @functools.cached_property
    def highest(self) -> np.ndarray:
        """[D], the highest code."""
        return np.array([2.0**bits - 1 for bits in self.bits])

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """[D], a Gaussian channel's step in its standard deviations; 1 where nothing is stored."""
        return np.array([GAUSSIAN_STEPS[bits] if bits else 1.0 for bits in self.bits])


@functools.cache
def code_layout(transform: str, bits: Bits, head_dim: int) -> CodeLayout:
    """The layout of keys or values of `head_dim` channels.

    Parameters
    ----------
    transform
        One of `settings.TRANSFORMS`.
    bits
        As of `Quantization.key_bits`.
    head_dim
        D, any size.
    """
    of_channel: list[int] = []
    planes: list[Plane] = []
    eighths = offset = 0
    if isinstance(bits, int):
        profile: Sequence[tuple[int, int]] = PROFILES[transform, bits]
    else:
        profile = [(width, len(list(same))) for width, same in itertools.groupby(bits)]
    for width, share in profile:
        first, eighths = len(of_channel), eighths + share
        channels = round(head_dim * eighths / 8) - first
        of_channel += [width] * channels
        shift = 0
        for part in WIDTHS.get(width, ()) if channels else ():
            nbytes = -(-channels * part // 8)
            planes.append(Plane(first, channels, part, shift, offset, nbytes))
            offset, shift = offset + nbytes, shift + part
    return CodeLayout(tuple(of_channel), tuple(planes), offset)
