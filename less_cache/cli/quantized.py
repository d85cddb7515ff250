"""The options of coded slots, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from .._checks import check_choice
from ..quantization import BITS, TRANSFORMS, Quantization
from ..quantization.transforms import FILE, Transforms

BitsOption = Annotated[
    int | None,
    typer.Option(
        help=f"Store pairs in so many bits a number: {', '.join(map(str, BITS))}; "
        "default: in the model's dtype."
    ),
]
KeyBitsOption = Annotated[
    int | None, typer.Option(help="Of keys; with --value-bits, in place of --bits.")
]
ValueBitsOption = Annotated[
    int | None, typer.Option(help="Of values; with --key-bits, in place of --bits.")
]
TransformOption = Annotated[
    str | None,
    typer.Option(help="Basis of the codes: hadamard (default), or calibrated, with --transforms."),
]
TransformsOption = Annotated[
    Path | None,
    typer.Option(help="FILE or FOLDER that less-cache calibrate wrote; its bits are the default."),
]


@dataclass(frozen=True)
class Codes:
    """How slots hold pairs.

    Parameters
    ----------
    quantization
        ``None``: as they are. One for all layers; one a layer where bases are for other bits.
    transforms
        The bases, where they are calibrated.
    options
        As they were given, for a command to go on with.
    """

    quantization: Quantization | Sequence[Quantization | None] | None = None
    transforms: Transforms | None = None
    options: dict[str, str] = field(default_factory=dict)


def read_codes(
    bits: int | None,
    key_bits: int | None,
    value_bits: int | None,
    transform: str | None,
    transforms: Path | None,
) -> Codes:
    """What the options say together.

    Raises
    ------
    ValueError
        If they contradict each other, or one lacks another; the error names the option.
    FileNotFoundError
        If there is no such file of transforms.
    """
    chosen = parse_bits(bits, key_bits, value_bits)
    if transform is not None:
        check_choice("transform", transform, TRANSFORMS)
    if transforms is None:
        if transform == "calibrated":
            raise ValueError(
                "transforms: got None, but transform = 'calibrated' needs what less-cache "
                "calibrate writes"
            )
        if transform is not None and chosen is None:
            raise ValueError(f"bits: got None, but transform = {transform!r}; expected --bits, too")
        if chosen is None:
            return Codes()
        return Codes(Quantization(*chosen), None, _words(*chosen))
    if transform == "hadamard":
        raise ValueError(
            f"transforms: got {str(transforms)!r}, but transform = 'hadamard' takes none"
        )
    name = "key_bits, value_bits" if bits is None else "bits"
    read = load_transforms(transforms)
    if missing := [layer for layer, own in enumerate(read) if own is None]:
        raise ValueError(
            f"transforms: {transforms} has none for layers {missing}, of which no option says how "
            "their pairs are stored; a recipe does"
        )
    fitted, *others = [read.bits_of(layer) for layer in range(len(read))]
    if others != [fitted] * len(others):
        if chosen is not None:
            raise ValueError(
                f"{name}: got {chosen} of keys and values, but {transforms} was fitted for others "
                f"by layer: {[fitted, *others]}"
            )
        by_layer = [Quantization(*own, read.kind) for own in (fitted, *others)]
        return Codes(by_layer, read, {"--transforms": str(transforms)})
    if chosen is None:
        if not all(fitted):
            raise ValueError(
                f"bits: got None, and {transforms} does not say for how many it was fitted"
            )
        chosen = fitted
    elif all(fitted) and chosen != fitted:
        raise ValueError(
            f"{name}: got {chosen} of keys and values, but {transforms} was fitted for {fitted}"
        )
    words = {"--transforms": str(transforms)}
    if not all(fitted):
        words = {**_words(*chosen), **words}
    return Codes(Quantization(*chosen, read.kind), read, words)


def parse_bits(
    bits: int | None, key_bits: int | None, value_bits: int | None
) -> tuple[int, int] | None:
    """Bits of keys and values; ``None`` where nothing is said of them.

    Raises
    ------
    ValueError
        If the options contradict each other, one is missing, or there are no such bits.
    """
    given = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits}
    for name, number in given.items():
        if number is not None and number not in BITS:
            raise ValueError(f"{name}: got {number}, expected one of {BITS}")
    if bits is not None:
        for name in ("key_bits", "value_bits"):
            if given[name] is not None:
                raise ValueError(
                    f"{name}: got {given[name]} beside bits = {bits}; expected --bits alone, or "
                    "--key-bits and --value-bits"
                )
        return bits, bits
    if key_bits is not None and value_bits is not None:
        return key_bits, value_bits
    if key_bits is None and value_bits is None:
        return None
    missing = "key_bits" if key_bits is None else "value_bits"
    raise ValueError(f"{missing}: got None; --key-bits and --value-bits go together")


def _words(key_bits: int, value_bits: int) -> dict[str, str]:
    if key_bits == value_bits:
        return {"--bits": str(key_bits)}
    return {"--key-bits": str(key_bits), "--value-bits": str(value_bits)}


def load_transforms(path: Path) -> Transforms:
    """What `calibrate` wrote, from its file or the folder of it.

    Raises
    ------
    FileNotFoundError, ValueError
        As `Transforms.load`.
    """
    return Transforms.load(path / FILE if path.is_dir() else path)


def transforms_file(out: Path) -> Path:
    """The file that a path means: itself, or that of our name where it is a folder."""
    if out.suffix == ".safetensors" and not out.is_dir():
        return out
    return out / FILE
