"""How many slots each head has, as the decode kernels read it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...layer_config import LayerConfig


def head_table(layer: LayerConfig, device: torch.device) -> Tensor | None:
    """[Hkv, 3] int32: each head's first slot, its slots, and the recent tokens it protects.

    ``None`` where all heads are alike, whose numbers then are arguments of the kernels. A table is
    made once for each layer and device, at the first step: make one before you capture a graph.
    """
    if layer.is_uniform:
        return None
    recents = tuple(policy.protected_recent for policy in layer.policies)
    return _table(layer.capacities, recents, device)


@cache
def _table(capacities: tuple[int, ...], recents: tuple[int, ...], device: torch.device) -> Tensor:
    # Never let go: a captured graph may hold its address.
    offsets = [sum(capacities[:head]) for head in range(len(capacities))]
    lines = list(zip(offsets, capacities, recents, strict=True))
    return torch.tensor(lines, dtype=torch.int32, device=device)
