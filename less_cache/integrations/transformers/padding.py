"""Texts of several lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import check_choice


def padded(texts: Sequence[Sequence[int]], *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest] of texts, both zero at padding.

    Parameters
    ----------
    texts
        Token ids of each.
    side
        Where padding stands: ``"left"`` or ``"right"``.
    """
    check_choice("side", side, ("left", "right"))
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, columns] = torch.tensor(text, dtype=torch.int64)
        mask[row, columns] = 1
    return ids, mask
