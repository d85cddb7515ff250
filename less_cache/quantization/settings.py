"""`Quantization`: what a user chooses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .._checks import check_choice, check_int

BITS = (2, 3, 4, 8)
"""Bits of a number, on average over a head's channels."""

TRANSFORMS = ("hadamard", "calibrated")


@dataclass(frozen=True)
class Quantization:
    """Keys and values are stored as integer codes with one 16-bit scale a key and one a value.

    A pair is coded once, when it enters its slot; in the step that brings it, it is attended
    exactly. What is merged into the low-rank state is the pair as it was stored.

    Parameters
    ----------
    key_bits, value_bits
        2, 3, 4 or 8 bits a number, on average.
    transform
        The basis in which pairs are coded. ``"hadamard"``: a fixed rotation that spreads outliers
        over all channels; it needs no data. ``"calibrated"``: matrices fitted to text, one a KV
        head, which give more bits to the channels that matter more (`Transforms.fit`).
    """

    key_bits: int = 3
    value_bits: int = 3
    transform: str = "hadamard"

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = check_int(name, getattr(self, name), minimum=1)
            if bits not in BITS:
                raise ValueError(f"{name}: got {bits}, expected one of {BITS}")
            object.__setattr__(self, name, bits)
        check_choice("transform", self.transform, TRANSFORMS)

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
