"""Attention over coded pairs as one piece of code, which PyTorch's Inductor compiles for a CPU.

Unpacking, products, softmax and the values' mean are a few passes over codes that stay in
registers: nothing is decoded to memory. Operator by operator the same sums would write every
unpacked pair several times.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...quantization import CodeLayout
from ...quantization.layout import Plane
from .attended import Attended
from .slots import RunSlots


def attend_codes(
    layer: LayerConfig,
    slots: RunSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    with_mass: bool,
) -> Attended:
    """`attend_pairs` over codes."""
    if layer.key_layout is None or layer.value_layout is None:
        raise AssertionError("there are no codes")
    run = _compiled(layer.key_layout, layer.value_layout, layer.scale, layer.softcap)
    new = [x.to(slots.wide) for x in (q, k, v)]
    stored = slots.chosen_pairs().values()
    return Attended(*run(*new, *stored, slots.positions, slot))


@functools.lru_cache(maxsize=64)
def _compiled(
    key_layout: CodeLayout, value_layout: CodeLayout, scale: float, softcap: float | None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # Dynamo counts compilations by code object, and runs what is beyond eight as it is: each layout
    # has its own. The first shape's code knows it; a second one makes code for any.
    own = types.FunctionType(_attend.__code__.replace(), globals(), _attend.__name__)
    compiled = torch.compile(own)
    return functools.partial(compiled, key_layout, value_layout, scale, softcap)


def _attend(
    key_layout: CodeLayout,
    value_layout: CodeLayout,
    scale: float,
    softcap: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    positions: Tensor,
    slot: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    own = (torch.arange(positions.shape[2], device=q.device) == slot).unsqueeze(2)
    products = torch.where(
        own, (q * k).sum(3, keepdim=True), _products(key_layout, q, keys, key_scales)
    )
    logits = products * scale
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = torch.where(positions.unsqueeze(2) == EMPTY, torch.finfo(q.dtype).min, logits)
    peak = logits.amax(3, keepdim=True)
    unscaled = (logits - peak).exp()
    mass = unscaled.sum(3, keepdim=True)
    probabilities = unscaled / mass
    share = torch.where(own, probabilities, 0).sum(3, keepdim=True)
    others = torch.where(own, 0, probabilities) * value_scales.unsqueeze(2).to(q.dtype)
    return _mix(value_layout, others, values) + share * v, probabilities, peak + mass.log()


def _products(layout: CodeLayout, q: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """q·k = s (q·code - q·center) of queries [B, H, G, D]: [B, H, G, C]."""
    total = torch.zeros_like(scales, dtype=q.dtype).unsqueeze(2)
    for run in _runs(layout):
        own = q[..., run.first : run.first + run.channels]
        pieces = _pieces(run, codes)
        size = pieces[0].shape[4]
        spread = torch.nn.functional.pad(own, (0, len(pieces) * size - run.channels))
        spread = spread.unflatten(3, (len(pieces), size)).unsqueeze(3)
        summed = sum(piece.to(q.dtype) * spread[..., i, :] for i, piece in enumerate(pieces))
        total = total + summed.sum(4) - (run.center * own.sum(3)).unsqueeze(3)
    return total * scales.unsqueeze(2).to(q.dtype)


def _mix(layout: CodeLayout, weights: Tensor, codes: Tensor) -> Tensor:
    """Σ w (code - center) of weights [B, H, G, C]: [B, H, G, D]."""
    everything = weights.sum(3, keepdim=True)
    mixed = []
    for run in _runs(layout):
        sums = [
            (piece.to(weights.dtype) * weights.unsqueeze(4)).sum(3) for piece in _pieces(run, codes)
        ]
        mixed.append(torch.cat(sums, 3)[..., : run.channels] - run.center * everything)
    return torch.nn.functional.pad(torch.cat(mixed, 3), (0, len(layout.bits) - layout.stored))


class _Run(NamedTuple):
    """Channels side by side that have the same number of bits, and the code that stands for 0."""

    first: int
    channels: int
    center: float
    planes: tuple[Plane, ...]


def _runs(layout: CodeLayout) -> list[_Run]:
    found: dict[int, list[Plane]] = {}
    for plane in layout.planes:
        found.setdefault(plane.first, []).append(plane)
    return [
        _Run(first, planes[0].channels, (2 ** layout.bits[first] - 1) / 2, tuple(planes))
        for first, planes in found.items()
    ]


def _pieces(run: _Run, codes: Tensor) -> list[Tensor]:
    """The run's codes [B, H, 1, C, n], n channels after n channels; the last may have some over.

    Where a code lies in two planes, a field of the wider one is cut into as many pieces as the
    narrower one's bytes fit into its own.
    """
    parts = [
        (codes[..., plane.offset : plane.offset + plane.nbytes].unsqueeze(2), plane)
        for plane in run.planes
    ]
    if len(parts) == 1:
        (low, plane) = parts[0]
        return [_field(low, i * plane.nbytes, plane, plane.nbytes) for i in range(8 // plane.width)]
    size = math.gcd(*(plane.nbytes for plane in run.planes))
    (low, below), (high, above) = parts
    return [
        _field(low, start, below, size) | _field(high, start, above, size) << above.shift
        for start in range(0, run.channels, size)
    ]


def _field(packed: Tensor, start: int, plane: Plane, size: int) -> Tensor:
    """A plane's bits of `size` channels from `start` on, which lie in one field."""
    byte = start % plane.nbytes
    shift = start // plane.nbytes * plane.width
    return (packed[..., byte : byte + size] >> shift) & (2**plane.width - 1)
