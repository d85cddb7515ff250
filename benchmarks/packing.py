"""Linear layers that run on weights which oneDNN has laid out beforehand.

A model's weights, unlike its cache, are the same for every contestant. PyTorch's plain matrix
product reads them at less than half the memory's speed on some CPUs when there are few rows, and
would thus hide much of what the caches cost. These layers use the operators that `torch.compile`
uses for frozen weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """``x @ weight.T``."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def pack(module: nn.Module, rows: int) -> None:
    """Replace every linear layer inside by a packed one.

    Parameters
    ----------
    module
        Changed in place.
    rows
        Rows of the products to lay the weights out for; others work too.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child.weight, rows))
        else:
            pack(child, rows)
