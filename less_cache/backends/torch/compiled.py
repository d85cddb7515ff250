"""Attention over coded pairs as one piece of code, which PyTorch's Inductor compiles for a CPU.

Unpacking, products, softmax and the values' mean are a few passes over codes that stay in
registers: nothing is decoded to memory. Operator by operator the same sums would write every
unpacked pair several times.
"""

from __future__ import annotations

import functools
import operator
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
    for stretch in _stretches(layout):
        weights = _weights(stretch, q).unsqueeze(3)
        fields = _fields(stretch, codes)
        products = [x.to(q.dtype) * weights[..., i, :] for i, x in enumerate(fields)]
        total = total + functools.reduce(operator.add, products).sum(4)
        for plane in stretch.planes:
            if not plane.shift:
                total = total - (_center(layout, plane) * _own(plane, q).sum(3)).unsqueeze(3)
    return total * scales.unsqueeze(2).to(q.dtype)


def _mix(layout: CodeLayout, weights: Tensor, codes: Tensor) -> Tensor:
    """Σ w (code - center) of weights [B, H, G, C]: [B, H, G, D]."""
    everything = weights.sum(3, keepdim=True)
    mixed: dict[int, Tensor] = {}
    for stretch in _stretches(layout):
        sums = [
            (field.to(weights.dtype) * weights.unsqueeze(4)).sum(3)
            for field in _fields(stretch, codes)
        ]
        for plane in stretch.planes:
            begin = plane.offset - stretch.planes[0].offset
            own = [x[..., begin : begin + plane.nbytes] for x in sums]
            parts = plane.width // stretch.width
            whole = [
                sum(own[first + i] * 2 ** (stretch.width * i) for i in range(parts))
                for first in range(0, len(own), parts)
            ]
            found = torch.cat(whole, 3)[..., : plane.channels]
            if plane.shift:
                mixed[plane.first] = mixed[plane.first] + found * 2**plane.shift
            else:
                mixed[plane.first] = found - _center(layout, plane) * everything
    stored = torch.cat([*mixed.values()], 3)
    return torch.nn.functional.pad(stored, (0, len(layout.bits) - layout.stored))


class _Stretch(NamedTuple):
    """Bytes side by side that are taken apart together, so many bits at a time."""

    planes: tuple[Plane, ...]
    width: int


def _stretches(layout: CodeLayout) -> list[_Stretch]:
    """A plane each; but several short ones would leave most of a vector empty, and are one."""
    if len(layout.planes) <= 2:
        return [_Stretch((plane,), plane.width) for plane in layout.planes]
    return [_Stretch(layout.planes, min(plane.width for plane in layout.planes))]


def _fields(stretch: _Stretch, codes: Tensor) -> list[Tensor]:
    """The stretch's bits of each width in turn, [B, H, 1, C, nbytes] each."""
    first, last = stretch.planes[0], stretch.planes[-1]
    packed = codes[..., first.offset : last.offset + last.nbytes].unsqueeze(2)
    mask = 2**stretch.width - 1
    return [(packed >> shift) & mask for shift in range(0, 8, stretch.width)]


def _weights(stretch: _Stretch, q: Tensor) -> Tensor:
    """What each of `_fields` counts for in q·code: [B, H, G, fields, nbytes]."""
    rows = []
    for shift in range(0, 8, stretch.width):
        parts = []
        for plane in stretch.planes:
            field, bit = divmod(shift, plane.width)
            own = _own(plane, q)[..., field * plane.nbytes : (field + 1) * plane.nbytes]
            own = torch.nn.functional.pad(own, (0, plane.nbytes - own.shape[3]))
            parts.append(own * 2 ** (plane.shift + bit))
        rows.append(torch.cat(parts, 3))
    return torch.stack(rows, 3)


def _own(plane: Plane, q: Tensor) -> Tensor:
    return q[..., plane.first : plane.first + plane.channels]


def _center(layout: CodeLayout, plane: Plane) -> float:
    """The code that stands for 0, no number of NumPy's, which would be traced as an array."""
    return (2 ** layout.bits[plane.first] - 1) / 2
