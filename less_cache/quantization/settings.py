"""`Quantization`: what a user chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .._checks import check_choice, check_int

BITS = (2, 3, 4, 8)
"""Bits of a number, on average over a head's channels."""

CHANNEL_BITS = (0, 1, 2, 3, 4, 6, 8)
"""Bits that a channel can have; 0: it is not stored."""

EIGHTHS = 8
"""The parts of a head's channels that can have bits of their own."""

Bits: TypeAlias = "int | tuple[int, ...]"
"""Bits on average; or those of each eighth of the channels, sorted, most bits first."""

TRANSFORMS = ("hadamard", "calibrated")


@dataclass(frozen=True)
class Quantization:
    """Keys and values are stored as integer codes with one 16-bit scale a key and one a value.

    A pair is coded once, when it enters its slot; in the step that brings it, it is attended
    exactly. What is merged into the low-rank state is the pair as it was stored.

    Parameters
    ----------
    key_bits, value_bits
        2, 3, 4 or 8 bits a number, on average. With calibrated bases also the bits of each eighth
        of the channels, those that matter most first: (6, 4, 4, 3, 3, 2, 2, 0).
    transform
        The basis in which pairs are coded. ``"hadamard"``: a fixed rotation that spreads outliers
        over all channels; it needs no data. ``"calibrated"``: matrices fitted to text, one a KV
        head, which give more bits to the channels that matter more (`Transforms.fit`).
    """

    key_bits: Bits = 3
    value_bits: Bits = 3
    transform: str = "hadamard"

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORMS)
        for name in ("key_bits", "value_bits"):
            object.__setattr__(self, name, _checked(name, getattr(self, name), self.transform))

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON-ready data; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Quantization:
        """Read the parameters back.

        Raises
        ------
        ValueError
            If fields are missing or unknown, or hold what `Quantization` refuses.
        """
        names = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"quantization: got {data!r}, expected the fields {sorted(names)}")
        return cls(**data)


def average_bits(bits: Bits) -> float:
    """Bits a number, on average over a head's channels."""
    return bits if isinstance(bits, int) else sum(bits) / len(bits)


def bits_text(bits: Bits) -> str:
    """Bits in words: 3, or 2.75 on average."""
    return f"{average_bits(bits):g}"


def _checked(name: str, bits: Any, transform: str) -> Bits:
    if not isinstance(bits, Sequence) or isinstance(bits, (str, bytes)):
        found = check_int(name, bits, minimum=1)
        if found not in BITS:
            raise ValueError(f"{name}: got {found}, expected one of {BITS}")
        return found
    profile = tuple(check_int(name, entry, minimum=0) for entry in bits)
    if transform != "calibrated":
        raise ValueError(
            f"{name}: got {profile}, but {transform!r} makes all channels alike; expected one "
            f"number of {BITS}"
        )
    falling = list(profile) == sorted(profile, reverse=True)
    if len(profile) != EIGHTHS or not falling or set(profile) - {*CHANNEL_BITS} or not profile[0]:
        raise ValueError(
            f"{name}: got {profile}, expected {EIGHTHS} numbers of {CHANNEL_BITS}, none larger "
            "than the one before, the first above 0"
        )
    return profile
