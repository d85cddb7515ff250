"""Attention over coded pairs as one piece of code, which PyTorch's Inductor compiles for a CPU.

Unpacking, products, softmax and the values' mean are a few passes over codes that stay in
registers: nothing is decoded to memory. Operator by operator the same sums would write every
unpacked pair several times.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

from ...arrays import EMPTY
from ...layer_config import LayerConfig
from ...quantization import CodeLayout
from .pairs import Attended
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
    # Dynamo counts compilations by code object, and gives up at eight: each layout has its own.
    own = types.FunctionType(_attend.__code__.replace(), globals(), _attend.__name__)
    compiled = torch.compile(own, fullgraph=True, dynamic=True)
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
    center = q[..., : layout.stored] @ torch.as_tensor(layout.centers[: layout.stored]).to(q)
    total = -center.unsqueeze(3)
    for plane in layout.planes:
        fields = 8 // plane.width
        part = codes[..., plane.offset : plane.offset + plane.nbytes].unsqueeze(2)
        own = q[..., plane.first : plane.first + plane.channels] * float(2**plane.shift)
        own = torch.nn.functional.pad(own, (0, fields * plane.nbytes - plane.channels))
        own = own.unflatten(3, (fields, plane.nbytes)).unsqueeze(3)
        summed = sum(
            _field(part, i, plane.width).to(q.dtype) * own[..., i, :] for i in range(fields)
        )
        total = total + summed.sum(4)
    return total * scales.unsqueeze(2).to(q.dtype)


def _mix(layout: CodeLayout, weights: Tensor, codes: Tensor) -> Tensor:
    """Σ w (code - center) of weights [B, H, G, C]: [B, H, G, D]."""
    weights = weights.unsqueeze(4)
    sums: dict[int, Tensor] = {}
    for plane in layout.planes:
        part = codes[..., plane.offset : plane.offset + plane.nbytes].unsqueeze(2)
        fields = [
            (_field(part, i, plane.width).to(weights.dtype) * weights).sum(3)
            for i in range(8 // plane.width)
        ]
        whole = torch.cat(fields, 3)[..., : plane.channels] * float(2**plane.shift)
        sums[plane.first] = sums[plane.first] + whole if plane.first in sums else whole
    mixed = torch.cat([*sums.values()], 3)
    mixed = mixed - weights.sum(3) * torch.as_tensor(layout.centers[: layout.stored]).to(weights)
    return torch.nn.functional.pad(mixed, (0, len(layout.bits) - layout.stored))


def _field(packed: Tensor, index: int, width: int) -> Tensor:
    return (packed >> (index * width)) & (2**width - 1)
