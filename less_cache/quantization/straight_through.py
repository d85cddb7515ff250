"""Codes that gradients pass: what a slot gives back, differentiable in what goes in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .codes import quantise
from .layout import CodeLayout


def read_back(layout: CodeLayout, u: Tensor) -> Tensor:
    """``decode(encode(u))``, the same numbers, with a gradient.

    With s the scale and x = u / s, a number is read as ``s (x + e)``. Where x lies within the
    levels the rounding error e counts as a constant; where it does not, the outermost level
    ``x + e`` does (Esser et al., arXiv 1902.08153). s is differentiable, but for its rounding to
    16 bits. Channels that are not stored are zero, and have no gradient.

    Parameters
    ----------
    layout
        Of the channels.
    u
        [..., D] in the inner basis, float32 or float64.
    """
    stored = layout.stored
    u = u[..., :stored]
    steps, centers, highest = (
        torch.as_tensor(x[:stored], dtype=u.dtype, device=u.device)
        for x in (layout.steps, layout.centers, layout.highest)
    )
    with torch.no_grad():
        codes, rounded = quantise(u, steps, centers, highest)
        rounded = rounded.to(u.dtype)
        levels = codes.to(u.dtype) - centers
    # The bound keeps the root's slope finite where a pair is zero.
    mean_square = (u * steps).square().mean(-1).clamp_min(torch.finfo(u.dtype).tiny)
    scale = mean_square.sqrt()
    scale = (scale + (rounded - scale).detach()).unsqueeze(-1)
    x = u / scale.clamp_min(torch.finfo(u.dtype).tiny)
    within = (x.detach() + centers >= -0.5) & (x.detach() + centers <= highest + 0.5)
    read = scale * (levels + torch.where(within, x - x.detach(), torch.zeros_like(x)))
    return F.pad(read, (0, len(layout.bits) - stored))
