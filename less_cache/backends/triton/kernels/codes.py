# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment,misc"
# ruff: noqa: RET505, RUF005 (Triton compiles these forms, and not their short ones)
"""Codes in registers: unpacked by shifts of whole runs of bytes, and packed.

The arithmetic is that of `quantization.codes`, whose docstrings say what a code is; the text CODES
is that of `planes`. `stored` points at a head's first code, or at one pair's.
"""

import triton
import triton.language as tl

from ..launch import INTERPRETED
from .planes import operands, pair_numbers, segment, segments, stored_channels, unpacking

LARGEST_SCALE: tl.constexpr = tl.constexpr(65504.0)
HALVES: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a float32 and taken away again, it rounds to the nearest even integer."""


@triton.constexpr_function
def of_16_bits(codes, i, dot):
    """Whether a segment is unpacked as `all_fields_of_16_bits` does."""
    return dot == tl.float16 and segment(codes, i, "halved") and not INTERPRETED


@triton.jit
def channels_of(CODES: tl.constexpr, PART: tl.constexpr):
    """Which channel each place of a segment is, and whether it is one: [places] each."""
    p = tl.arange(0, segment(CODES, PART, "places"))
    byte = p // (4 * segment(CODES, PART, "fields")) * 4 + p % 4
    channel = p // 4 % segment(CODES, PART, "fields") * segment(CODES, PART, "low_bytes") + byte
    real = (byte < segment(CODES, PART, "low_bytes")) & (channel < segment(CODES, PART, "channels"))
    return segment(CODES, PART, "first") + channel, real


@triton.jit
def units_of(CODES: tl.constexpr, PART: tl.constexpr):
    """What the number 1 of `codes_in` is in codes, at each place: 2^-k, k bits up in a byte."""
    f = tl.arange(0, segment(CODES, PART, "places")) // 4 % segment(CODES, PART, "fields")
    return 1.0 / (1 << (f * segment(CODES, PART, "low_width"))).to(tl.float32)


@triton.jit
def field(lows, more, f: tl.constexpr, CODES: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr):
    """Field f of bytes of the low plane in `units_of`; `more` has its high bits lowest."""
    code = lows >> (f * segment(CODES, PART, "low_width"))
    code = code & ((1 << segment(CODES, PART, "low_width")) - 1)
    if segment(CODES, PART, "high_width") > 0:
        more = more & ((1 << segment(CODES, PART, "high_width")) - 1)
        code = code | (more << segment(CODES, PART, "low_width"))
    return code.to(DOT) * (1 << (f * segment(CODES, PART, "low_width")))


@triton.jit
def all_fields(found, CODES: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr):
    """Every field of `load_bytes` as numbers, a tuple of tensors like its first."""
    numbers = ()
    for f in tl.static_range(segment(CODES, PART, "fields")):
        more = found[0]
        if segment(CODES, PART, "high_width") > 0:
            channel = f * segment(CODES, PART, "low_bytes") + tl.arange(
                0, segment(CODES, PART, "padded_bytes")
            )
            shift = channel // segment(CODES, PART, "high_bytes")
            more = (
                found[1 + f] >> (shift * segment(CODES, PART, "high_width")).to(tl.uint8)[None, :]
            )
        numbers = numbers + (field(found[0], more, f, CODES, PART, DOT),)
    return numbers


@triton.jit
def all_fields_of_16_bits(found, CODES: tl.constexpr, PART: tl.constexpr):
    """The same in float16, four bytes at a time. A high plane must be half of the low one."""
    if segment(CODES, PART, "high_width") > 0:
        byte = tl.arange(0, segment(CODES, PART, "padded_bytes"))
        # One load has the high bits of all fields: of the run's second half, one width further up.
        second = tl.where(byte < segment(CODES, PART, "high_bytes"), 0, 255).to(tl.uint8)
        taken = (found[0], found[1], second[None, :] + tl.zeros(found[0].shape, tl.uint8))
    else:
        taken = (found[0],)
    if segment(CODES, PART, "fields") == 4:
        return tl.inline_asm_elementwise(
            unpacking(CODES, PART),
            operands(CODES, PART),
            taken,
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif segment(CODES, PART, "fields") == 2:
        return tl.inline_asm_elementwise(
            unpacking(CODES, PART),
            operands(CODES, PART),
            taken,
            (tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        return (
            tl.inline_asm_elementwise(
                unpacking(CODES, PART),
                operands(CODES, PART),
                taken,
                tl.float16,
                is_pure=True,
                pack=4,
            ),
        )


@triton.jit
def load_bytes(stored, slots, inside, CODES: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr):
    """Bytes [BLOCK_C, padded_bytes] of one segment of pairs: the low plane's, and the high one's.

    A tuple; the high plane's once where one load has the high bits of all fields, else for each
    field. Any bytes are codes: an empty slot's may be read, and are numbers. 0 where not `inside`.
    """
    byte = tl.arange(0, segment(CODES, PART, "padded_bytes"))
    at = stored + slots[:, None] * pair_numbers(CODES, 0)
    near = inside[:, None]
    if segment(CODES, PART, "padded_bytes") > segment(CODES, PART, "low_bytes"):
        near = near & (byte < segment(CODES, PART, "low_bytes"))[None, :]
    lows = tl.load(at + (segment(CODES, PART, "low_offset") + byte)[None, :], mask=near, other=0)
    found = (lows,)
    if segment(CODES, PART, "high_width") > 0:
        own = segment(CODES, PART, "high_offset")
        if of_16_bits(CODES, PART, DOT):
            more = own + byte % segment(CODES, PART, "high_bytes")
            found = found + (tl.load(at + more[None, :], mask=near, other=0),)
        else:
            for f in tl.static_range(segment(CODES, PART, "fields")):
                channel = f * segment(CODES, PART, "low_bytes") + byte
                more = own + channel % segment(CODES, PART, "high_bytes")
                found = found + (tl.load(at + more[None, :], mask=near, other=0),)
    return found


@triton.jit
def codes_in(found, CODES: tl.constexpr, PART: tl.constexpr, DOT: tl.constexpr):
    """Codes [BLOCK_C, places] of what `load_bytes` found, in `units_of`."""
    if of_16_bits(CODES, PART, DOT):
        numbers = all_fields_of_16_bits(found, CODES, PART)
    else:
        numbers = all_fields(found, CODES, PART, DOT)
    ROWS: tl.constexpr = found[0].shape[0]
    FOURS: tl.constexpr = segment(CODES, PART, "padded_bytes") // 4
    if segment(CODES, PART, "fields") == 4:
        even = tl.join(fours(numbers[0], ROWS, FOURS), fours(numbers[2], ROWS, FOURS))
        odd = tl.join(fours(numbers[1], ROWS, FOURS), fours(numbers[3], ROWS, FOURS))
        joined = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
        return tl.reshape(joined, [ROWS, segment(CODES, PART, "places")])
    elif segment(CODES, PART, "fields") == 2:
        joined = tl.join(fours(numbers[0], ROWS, FOURS), fours(numbers[1], ROWS, FOURS))
        joined = tl.permute(joined, (0, 1, 3, 2))
        return tl.reshape(joined, [ROWS, segment(CODES, PART, "places")])
    else:
        return numbers[0]


@triton.jit
def fours(found, ROWS: tl.constexpr, FOURS: tl.constexpr):
    """[ROWS, 4 FOURS] as [ROWS, FOURS, 4]."""
    return tl.reshape(found, [ROWS, FOURS, 4])


@triton.jit
def centred(at, held, d, CODES: tl.constexpr):
    """Codes less their centers of channels d of pairs whose bytes begin at `at`: float32.

    `at`, `held` and `d` are broadcast; 0 where not `held`, and in channels not stored.
    """
    number = tl.where(held & (d < 0), 1.0, 0.0)
    for i in tl.static_range(segments(CODES)):
        channel = d - segment(CODES, i, "first")
        own = held & (channel >= 0) & (channel < segment(CODES, i, "channels"))
        byte = segment(CODES, i, "low_offset") + channel % segment(CODES, i, "low_bytes")
        shift = channel // segment(CODES, i, "low_bytes") * segment(CODES, i, "low_width")
        code = tl.load(at + byte, mask=own, other=0).to(tl.int32) >> shift
        code = code & ((1 << segment(CODES, i, "low_width")) - 1)
        if segment(CODES, i, "high_width") > 0:
            byte = segment(CODES, i, "high_offset") + channel % segment(CODES, i, "high_bytes")
            shift = channel // segment(CODES, i, "high_bytes") * segment(CODES, i, "high_width")
            high = tl.load(at + byte, mask=own, other=0).to(tl.int32) >> shift
            high = high & ((1 << segment(CODES, i, "high_width")) - 1)
            code = code | (high << segment(CODES, i, "low_width"))
        number += tl.where(own, code.to(tl.float32) - segment(CODES, i, "center"), 0.0)
    return number


@triton.jit
def scale_of(u, CODES: tl.constexpr, BLOCK_D: tl.constexpr):
    """The scale of a key or value u [BLOCK_D] float32, as it is stored: float16."""
    d = tl.arange(0, BLOCK_D)
    steps = tl.zeros([BLOCK_D], tl.float32)
    for i in tl.static_range(segments(CODES)):
        own = (d >= segment(CODES, i, "first")) & (
            d < segment(CODES, i, "first") + segment(CODES, i, "channels")
        )
        steps = tl.where(own, segment(CODES, i, "step"), steps)
    weighted = tl.where(d < stored_channels(CODES, 0), u * steps, 0.0)
    # The largest number comes out first, so that no square overflows or vanishes.
    largest = tl.max(tl.abs(weighted), 0)
    part = tl.div_rn(
        weighted, tl.where(largest > 0, largest, 1.0) + tl.zeros([BLOCK_D], tl.float32)
    )
    mean_square = tl.sum(part * part, 0) / stored_channels(CODES, 0)
    scale = tl.sqrt_rn(mean_square) * largest
    # A comparison that NaN fails, as `min` would not let it through.
    return tl.where(scale > LARGEST_SCALE, LARGEST_SCALE, scale).to(tl.float16)


@triton.jit
def code_of(u, divisor, CODES: tl.constexpr, PART: tl.constexpr):
    """Codes of numbers, int32."""
    code = tl.div_rn(u, divisor + tl.zeros(u.shape, tl.float32)) + segment(CODES, PART, "center")
    code = tl.minimum(tl.maximum(code, 0.0), (1 << segment(CODES, PART, "bits")) - 1.0)
    return ((code + HALVES) - HALVES).to(tl.int32)


@triton.jit
def plane_bytes(
    u,
    divisor,
    CODES: tl.constexpr,
    PART: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A plane's bytes [BLOCK] of one pair, whose numbers `u` points at."""
    byte = tl.arange(0, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    for f in tl.static_range(8 // WIDTH):
        channel = f * BYTES + byte
        real = (byte < BYTES) & (channel < segment(CODES, PART, "channels"))
        number = tl.load(u + segment(CODES, PART, "first") + channel, mask=real, other=0.0)
        code = code_of(number.to(tl.float32), divisor, CODES, PART)
        part = (code >> SHIFT) & ((1 << WIDTH) - 1)
        packed = packed | (tl.where(real, part, 0) << (f * WIDTH))
    return packed.to(tl.uint8)


@triton.jit
def store_codes(stored, u, scale, CODES: tl.constexpr):
    """Code the numbers that `u` points at with `scale`, and put them where `stored` points at."""
    wide = scale.to(tl.float32)
    # A scale of 0 reads as 0 whatever the codes are.
    divisor = tl.where(wide > 0, wide, 1.0)
    for i in tl.static_range(segments(CODES)):
        byte = tl.arange(0, segment(CODES, i, "padded_bytes"))
        packed = plane_bytes(
            u,
            divisor,
            CODES,
            i,
            segment(CODES, i, "low_bytes"),
            segment(CODES, i, "low_width"),
            0,
            segment(CODES, i, "padded_bytes"),
        )
        at = stored + segment(CODES, i, "low_offset") + byte
        tl.store(at, packed, mask=byte < segment(CODES, i, "low_bytes"))
        if segment(CODES, i, "high_width") > 0:
            high = tl.arange(0, segment(CODES, i, "padded_high_bytes"))
            more = plane_bytes(
                u,
                divisor,
                CODES,
                i,
                segment(CODES, i, "high_bytes"),
                segment(CODES, i, "high_width"),
                segment(CODES, i, "low_width"),
                segment(CODES, i, "padded_high_bytes"),
            )
            at = stored + segment(CODES, i, "high_offset") + high
            tl.store(at, more, mask=high < segment(CODES, i, "high_bytes"))
