"""How many tokens a cache has seen: a number for Python, a tensor for a compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokensSeen:
    """A count that compiled passes advance without being compiled anew.

    A Python number would be part of what a graph was made for. While compiling, the count is
    therefore a tensor, as that of transformers' `StaticCache`; Python reads it when it next asks.
    """

    def __init__(self) -> None:
        self._number = 0
        self._known = True
        self._tensor: Tensor | None = None

    @property
    def number(self) -> int:
        """The count; asks the device where a compiled pass was the last to advance it."""
        if not self._known and self._tensor is not None:
            self._number, self._known = int(self._tensor), True
        return self._number

    @property
    def value(self) -> Any:
        """The count in the form that suits whoever asks: `number`, or a tensor of one."""
        if torch.compiler.is_compiling() and self._tensor is not None:
            return self._tensor
        return self.number

    def place(self, device: Any) -> None:
        """Keep the tensor there."""
        self._tensor = torch.tensor(self.number, device=device)

    def set(self, number: int) -> None:
        """Begin again from `number`."""
        self._number, self._known = number, True
        if self._tensor is not None:
            self._tensor.fill_(number)

    def advance(self, tokens: int) -> None:
        """So many more have been seen."""
        if torch.compiler.is_compiling() and self._tensor is not None:
            self._tensor.add_(tokens)
            self._known = False
            return
        self.set(self.number + tokens)
