"""Codes and scales of pairs, over the array API: NumPy and torch run the same lines.

A number u of channel c becomes ``code = round(u / s + center_c)``, clipped to what its bits hold,
and is read as ``s (code - center_c)``. The scale s is one for all channels of a key or value: the
root of their mean square, each in units of its own step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np
import torch

from .layout import CodeLayout

Array = Any

SCALE_DTYPE = "float16"
LARGEST_SCALE = float(np.finfo(np.float16).max)


def encode(layout: CodeLayout, u: Array) -> tuple[Array, Array]:
    """Codes and scales of numbers in the inner basis.

    Parameters
    ----------
    layout
        Of the channels.
    u
        [..., D], float32 or float64.

    Returns
    -------
    codes
        [..., nbytes] uint8.
    scales
        [...] float16. A scale above float16's range is its largest number.
    """
    u = u[..., : layout.stored]
    found, scales = quantise(
        u, *(_like(u, x[: layout.stored]) for x in (layout.steps, layout.centers, layout.highest))
    )
    return pack(layout, found), scales


def quantise(u: Array, steps: Array, centers: Array, highest: Array) -> tuple[Array, Array]:
    """Codes [..., stored] uint8, before they are packed, and scales [...] float16.

    Parameters
    ----------
    u
        [..., stored], the channels that are stored.
    steps, centers, highest
        [stored], of the layout, in u's dtype.
    """
    xp = array_api_compat.array_namespace(u)
    weighted = u * steps
    # The largest number comes out first, so that no square overflows or vanishes.
    largest = xp.max(xp.abs(weighted), axis=-1)
    safe = xp.where(largest > 0, largest, xp.ones_like(largest))
    mean_square = xp.mean((weighted / safe[..., None]) ** 2, axis=-1)
    scales = xp.clip(xp.sqrt(mean_square) * largest, 0.0, LARGEST_SCALE)
    scales = xp.astype(scales, getattr(xp, SCALE_DTYPE))
    wide = xp.astype(scales, u.dtype)
    # A scale of 0 reads as 0 whatever the codes are.
    divisor = xp.where(wide > 0, wide, xp.ones_like(wide))
    codes = xp.round(u / divisor[..., None] + centers)
    codes = xp.where(codes < 0, xp.zeros_like(codes), xp.where(codes > highest, highest, codes))
    return xp.astype(codes, xp.uint8), scales


def decode(layout: CodeLayout, codes: Array, scales: Array, dtype: Any) -> Array:
    """Numbers in the inner basis, [..., D], as `encode` took them; 0 in channels not stored.

    Parameters
    ----------
    layout
        Of the channels.
    codes
        [..., nbytes] uint8.
    scales
        [...] float16.
    dtype
        Of what comes out.
    """
    xp = array_api_compat.array_namespace(codes)
    levels = xp.astype(unpack(layout, codes), dtype)
    stored = layout.stored
    levels = (levels - _like(levels, layout.centers[:stored])) * xp.astype(scales, dtype)[..., None]
    if stored == len(layout.bits):
        return levels
    rest = xp.zeros(
        (*levels.shape[:-1], len(layout.bits) - stored),
        dtype=dtype,
        device=array_api_compat.device(levels),
    )
    return xp.concat([levels, rest], axis=-1)


def encode_pairs(keys: CodeLayout, values: CodeLayout, k: Array, v: Array) -> dict[str, Array]:
    """What slots hold of pairs [..., D] in the inner basis, by the names of `LayerArrays`."""
    key_codes, key_scales = encode(keys, k)
    value_codes, value_scales = encode(values, v)
    return {
        "keys": key_codes,
        "values": value_codes,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }


def decode_pairs(
    keys: CodeLayout, values: CodeLayout, stored: Mapping[str, Array], dtype: Any
) -> tuple[Array, Array]:
    """Keys and values [..., D] in the inner basis, of what `encode_pairs` made."""
    return (
        decode(keys, stored["keys"], stored["key_scales"], dtype),
        decode(values, stored["values"], stored["value_scales"], dtype),
    )


def pack(layout: CodeLayout, codes: Array) -> Array:
    """Bytes [..., nbytes] of codes [..., stored], uint8 both."""
    xp = array_api_compat.array_namespace(codes)
    parts = []
    for plane in layout.planes:
        part = codes[..., plane.first : plane.first + plane.channels]
        part = (part >> plane.shift) & (2**plane.width - 1)
        fields = 8 // plane.width
        missing = plane.nbytes * fields - plane.channels
        if missing:
            part = _padded(xp, part, missing)
        part = xp.reshape(part, (*part.shape[:-1], fields, plane.nbytes))
        packed = part[..., 0, :]
        for i in range(1, fields):
            packed = packed | (part[..., i, :] << (i * plane.width))
        parts.append(packed)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)


def unpack(layout: CodeLayout, packed: Array) -> Array:
    """Codes [..., stored] of bytes [..., nbytes], uint8 both."""
    xp = array_api_compat.array_namespace(packed)
    found: dict[int, Array] = {}
    for plane in layout.planes:
        part = packed[..., plane.offset : plane.offset + plane.nbytes]
        mask = 2**plane.width - 1
        fields = [(part >> (i * plane.width)) & mask for i in range(8 // plane.width)]
        codes = fields[0] if len(fields) == 1 else xp.concat(fields, axis=-1)
        codes = codes[..., : plane.channels]
        if plane.shift:
            codes = found[plane.first] | (codes << plane.shift)
        found[plane.first] = codes
    parts = list(found.values())
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)


def _padded(xp: Any, array: Array, missing: int) -> Array:
    shape = (*array.shape[:-1], missing)
    zeros = xp.zeros(shape, dtype=array.dtype, device=array_api_compat.device(array))
    return xp.concat([array, zeros], axis=-1)


def _like(array: Array, constants: np.ndarray) -> Array:
    if isinstance(array, torch.Tensor):
        return torch.as_tensor(constants, dtype=array.dtype, device=array.device)
    return constants.astype(array.dtype)
