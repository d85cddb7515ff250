"""A decode step's launches as kernels whose sizes are parameters, and the record of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import triton

from ....layer_maps import LAST_LAYERS
from ....policies import Gain, Start
from ....quantization import TRANSFORMS
from ....quantization.settings import spelled_bits
from ..kernels.maths import NO_MAPS
from ..launch import Launch, recording
from ..plans import MOST_SCANNED
from .compiling import Signature, compile_kernel, signature
from .layouts import Layout, Score
from .on_meta import meta_maps, meta_step

HIDDEN_MULTIPLE = 16
"""The maps' hidden size is a multiple of it: rows of their matrices then begin aligned."""

NUMBERS = ("batch", "capacity", "sinks", "recent", "splits", "QUERY_HEADS", "KV_HEADS")
"""Sizes that no code depends on."""

VECTORS = ("keys", "values", "H", "q", "k", "v")
"""Arrays whose rows begin as aligned as their heads do."""

SCORES: tuple[Score, ...] = tuple(
    (start, gain)
    for gain in Gain
    for start in Start
    if start is not Start.GIVEN and gain is not Gain.GIVEN
)
"""Every score that kernels know; its place here is its bit in `Record.scores`."""

BATCHES = (16, 32)
"""One for each tile of sequences that kernel A has."""

MAPS_ARRAYS = {"phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_b1", "phi_out", "psi_out"}
"""What the maps of every kind read and write."""

LAST_ARRAYS = {name for names in LAST_LAYERS.values() for name in names}
"""What those of one kind read."""

ANY = -1


@dataclass(frozen=True)
class Record:
    """One kernel for one architecture: what it serves, how it is launched, where it lies.

    Attributes
    ----------
    kernel
        ``"select_and_map"``, ``"attend"`` or ``"conclude_split"``.
    dtype, state_dtype
        Of the model; of H and z; ``""``: any.
    arch, ptx
        Compute capability; of PTX: the least one.
    head_dim, block_d
        D, 0: any; the power of two that holds it.
    scores
        Bit 3 g + s set: for what starts as `Start` s and gains as `Gain` g.
    kind
        Of the maps: 0 none, 1 "paper", 2 "exp", -1: any.
    group, block_g
        1: for G = 1; 0: for G up to `block_g`.
    block_r
        0: for rank 0; else for ranks up to it; -1: any.
    block_b
        Sequences a program (kernel A).
    selects
        Of ``"select_and_map"``: whether it chooses the victims, or finds them chosen; else -1.
    softcap
        The one compiled in, 0: none; -1: any.
    split
        Of ``"attend"``: whether programs share a head's slots; else -1.
    hidden_multiple, rank_multiple
        What the hidden size and the rank are multiples of.
    block_c
        Slots a tile of ``"attend"``.
    key_bits, value_bits
        Of codes, as `spelled_bits` has them; ``"0"``: for pairs that are stored as they are;
        ``""``: any.
    transform
        Of codes: its place in `TRANSFORMS`; -1: any.
    key_bytes, value_bytes
        Of one pair's codes; 0 where they are not read.
    warps, shared_bytes
        Threads a program, by 32; its dynamic shared memory.
    symbol, parameters
        The function's name, and ``"name:type ..."`` in order. Two null pointers follow them.
    offset, size
        In ``kernels.bin``, bytes.
    """

    kernel: str
    dtype: str
    state_dtype: str
    arch: int
    ptx: bool
    head_dim: int
    block_d: int
    scores: int
    kind: int
    group: int
    block_g: int
    block_r: int
    block_b: int
    selects: int
    softcap: float
    split: int
    hidden_multiple: int
    rank_multiple: int
    block_c: int
    key_bits: str
    value_bits: str
    transform: int
    key_bytes: int
    value_bytes: int
    warps: int
    shared_bytes: int
    symbol: str
    parameters: str
    offset: int = 0
    size: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Image:
    """A record, not yet placed, and its code: a cubin, or PTX and a zero byte."""

    record: Record
    code: bytes


def initialiser(record: Record) -> str:
    """`record` as a C++ aggregate, one line."""
    values = [_literal(getattr(record, field.name)) for field in fields(record)]
    return "{" + ", ".join(values) + "},\n"


def compile_layout(layout: Layout, arch: int, with_code: bool, with_ptx: bool) -> list[Image]:
    """Compile all kernels of one layout for one architecture: to machine code, PTX, or both."""
    images = []
    for wanted in launches(layout):
        parameters = generalised(wanted, layout)
        with triton.knobs.compilation.scope():
            # Source paths would take half of the bytes, and name folders of the build machine.
            triton.knobs.compilation.disable_line_info = True
            compiled = compile_kernel(wanted, parameters, arch)
        metadata = compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise AssertionError(f"{metadata.name} wants scratch memory, which nobody would give")
        for ptx in [False] * with_code + [True] * with_ptx:
            record = record_of(wanted, parameters, layout, arch, ptx, metadata)
            code = compiled.asm["ptx"].encode() + b"\0" if ptx else compiled.asm["cubin"]
            images.append(Image(record, code))
    return images


def launches(layout: Layout) -> list[Launch]:
    """What decode steps of `layout` launch, each kernel once.

    For few and many sequences, few and many slots, slots shared or not.
    """
    few = layout.example
    many = replace(few, capacities=(2 * MOST_SCANNED,) * few.kv_heads)
    maps = meta_maps(few, layout.kind, HIDDEN_MULTIPLE)
    found: dict[str, Launch] = {}
    for layer in (few, many):
        for batch, splits in zip(BATCHES, (1, 2), strict=True):
            with recording() as recorded:
                meta_step(layer, batch, maps, masked=True, splits=splits)
            for wanted in recorded:
                found.setdefault(f"{wanted.kernel.__name__} {wanted.constants}", wanted)
    return list(found.values())


def generalised(wanted: Launch, layout: Layout) -> Signature:
    """The launch's signature with every size as a parameter that the code need not know.

    Two scores that lead to the same code get the same constants, so that it is compiled once.
    """
    found = signature(wanted)
    name = wanted.kernel.__name__
    for size in NUMBERS:
        if size in found.types:
            found.pass_on(size, "i32")
    # The caller's arrays are dense: rows lie a multiple of D apart, in 64 bits.
    found.fix("ALIGNED", False)
    _strided(found, layout)
    if layout.codes is None:
        _drop(found, "key_scales", "value_scales")
    if name == "select_and_map":
        _generalise_selection(found, wanted, layout)
        return found
    if layout.kind is not None:
        found.pass_on("RANK", "i32", layout.rank_multiple)
    found.pass_on("mask", "*i32", 16)
    found.fix("mask_stride", 1)
    found.pass_on("SCALE", "fp32")
    if layout.group > 1:
        found.pass_on("GROUP", "i32")
    if not layout.rank:
        _drop(found, "H", "z", "shift")
    if layout.score[1] is not Gain.HISTORY:
        _drop(found, "history")
    if not layout.example.keeps_scores:
        _drop(found, "scores")
    if layout.score[1] is Gain.NONE:
        _drop(found, "logits")
    if name == "attend":
        found.fix("splits", 1)
    if name == "attend" and wanted.constants["SPLIT"]:
        found.pass_on("splits", "i32")
        _fix_score(found, _like_over_slots(layout.score))
        _drop(found, "k", "v", "scores", "history", "H", "z", "shift")
        for unread in ("phi", "psi"):
            found.fix(unread, None)
        for unread in ("DECAY", "WINDOW", "RANK", "BLOCK_R"):
            found.fix(unread, 0)
        return found
    if layout.score[1] is Gain.SUM:
        found.pass_on("DECAY", "fp32")
    if layout.score[1] is Gain.HISTORY:
        found.pass_on("WINDOW", "i32")
    return found


def _generalise_selection(found: Signature, wanted: Launch, layout: Layout) -> None:
    """The same of kernel A."""
    maps = wanted.constants["KIND"] != NO_MAPS.value
    if wanted.constants["SELECTS"]:
        score = _like_in_selection(layout.score)
        _fix_score(found, score)
        if score[1] is Gain.NONE:
            _drop(found, "scores")
    else:
        _drop(found, "scores", "positions")
        for unread in ("sinks", "recent"):
            found.fix(unread, 0)
    if not maps:
        _drop(found, "q", "keys", "key_scales", *MAPS_ARRAYS, *LAST_ARRAYS)
        return
    _drop(found, *(LAST_ARRAYS - {*LAST_LAYERS[layout.kind or ""]}))
    found.pass_on("RANK", "i32", layout.rank_multiple)
    found.pass_on("HIDDEN", "i32", HIDDEN_MULTIPLE)
    # Sizes take registers, too: with wider tiles heads of 128 spilled some.
    found.fix("BLOCK_H", 32)


def _strided(found: Signature, layout: Layout) -> None:
    """Strides between rows and heads as parameters, whatever they were in the example."""
    layer = layout.example
    pairs = {"keys": layer.key_layout, "values": layer.value_layout}
    for name in found.types:
        array = name.removesuffix("_stride").removesuffix("_row").removesuffix("_head")
        codes = pairs.get(array)
        size = layer.head_dim if codes is None else codes.nbytes
        multiple = min(16, size & -size)
        if name.endswith("_row_stride"):
            found.pass_on(name, "i64", multiple if array in VECTORS else 1)
        elif name.endswith("_head_stride"):
            found.pass_on(name, "i32", multiple)


def _drop(found: Signature, *arrays: str) -> None:
    """Arrays that are not read are no parameters, nor are their strides."""
    for array in arrays:
        if array not in found.types:
            continue
        found.fix(array, None)
        for stride in (f"{array}_row_stride", f"{array}_head_stride"):
            if stride in found.types:
                found.fix(stride, 0)


def _fix_score(found: Signature, score: Score) -> None:
    for name, value in zip(("START", "GAIN"), score, strict=True):
        found.fix(name, int(value))


def _like_in_selection(score: Score) -> Score:
    """The victim is the oldest, or the one of least score."""
    by_age = score[1] is Gain.NONE and score[0] is not Start.KEY_NORM
    return (Start.POSITION, Gain.NONE) if by_age else (Start.ZERO, Gain.SUM)


def _like_over_slots(score: Score) -> Score:
    """Logits are left for later, or not."""
    return (Start.ZERO, Gain.NONE if score[1] is Gain.NONE else Gain.SUM)


def record_of(
    wanted: Launch, parameters: Signature, layout: Layout, arch: int, ptx: bool, metadata: Any
) -> Record:
    """What there is to know of a compiled kernel; `metadata` is the compiler's."""
    name, constants = wanted.kernel.__name__, wanted.constants
    first = name == "select_and_map"
    split = name == "attend" and bool(constants["SPLIT"])
    alike: Sequence[Score] = [layout.score]
    if first and not constants["SELECTS"]:
        alike = SCORES
    elif first:
        alike = [s for s in SCORES if _like_in_selection(s) == _like_in_selection(layout.score)]
    elif split:
        alike = [s for s in SCORES if _like_over_slots(s) == _like_over_slots(layout.score)]
    maps = first and constants["KIND"] != NO_MAPS.value
    simple = first and not maps
    low_rank = not split and not simple
    key, value = layout.example.key_layout, layout.example.value_layout
    codes = layout.codes
    return Record(
        kernel=name,
        dtype="" if simple else layout.dtype,
        state_dtype="" if first or split or not layout.rank else layout.state_dtype,
        arch=arch,
        ptx=ptx,
        head_dim=0 if simple else layout.head_dim,
        block_d=0 if simple else constants["BLOCK_D"],
        scores=sum(1 << SCORES.index(score) for score in alike),
        kind=constants["KIND"] if first else ANY,
        group=0 if first or layout.group > 1 else 1,
        block_g=0 if first else constants["BLOCK_G"],
        block_r=(constants["BLOCK_R"] if layout.rank else 0) if low_rank else ANY,
        block_b=constants["BLOCK_B"] if first else 0,
        selects=int(constants["SELECTS"]) if first else ANY,
        softcap=float(ANY) if first else layout.softcap or 0.0,
        split=int(split) if name == "attend" else ANY,
        hidden_multiple=HIDDEN_MULTIPLE if maps else 1,
        rank_multiple=layout.rank_multiple if low_rank and layout.rank else 1,
        block_c=constants["BLOCK_C"] if name == "attend" else 0,
        key_bits="" if simple else "0" if codes is None else spelled_bits(codes.key_bits),
        value_bits="" if first else "0" if codes is None else spelled_bits(codes.value_bits),
        transform=ANY if simple or codes is None else TRANSFORMS.index(codes.transform),
        key_bytes=0 if simple or key is None else key.nbytes,
        value_bytes=0 if first or value is None else value.nbytes,
        warps=wanted.warps,
        shared_bytes=int(metadata.shared),
        symbol=metadata.name,
        parameters=" ".join(
            f"{key}:{_type(kind)}"
            for key in wanted.kernel.arg_names
            if (kind := parameters.types[key]) != "constexpr"
        ),
    )


def _type(kind: str) -> str:
    return "ptr" if kind.startswith("*") else {"fp32": "f32"}.get(kind, kind)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value!r}F"
    return f'"{value}"' if isinstance(value, str) else str(value)
