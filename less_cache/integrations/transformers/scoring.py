"""The layer of a pass that scores known tokens and keeps no cache."""

from __future__ import annotations

from torch import Tensor

from ...config import CacheConfig
from ...manager import CacheManager
from ...scoring import attend_from_empty


class ScoringLayer:
    """One full-attention layer that attends as a fresh cache would, token by token.

    It holds nothing, so that a layer may be run again in a backward pass.

    Parameters
    ----------
    manager
        Config, maps and backend.
    index
        Which layer of the config.
    """

    def __init__(self, manager: CacheManager, index: int) -> None:
        self.manager = manager
        self.index = index
        self.used = False
        """Whether the model ever called it."""

    @property
    def config(self) -> CacheConfig:
        """Of the cache it stands for."""
        return self.manager.config

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, Hq, S, D] from q [B, Hq, S, D], k and v [B, Hkv, S, D], mask [B, S]."""
        self.used = True
        # After rope under autocast keys may be wider than values, which have the model's dtype.
        dtype = v.dtype
        out = attend_from_empty(
            self.config.with_dtype(dtype).layer(self.index),
            None if self.manager.maps is None else self.manager.maps[self.index],
            q.to(dtype),
            k.to(dtype),
            v,
            None if mask is None else mask != 0,
            backend=self.manager.backend,
            transforms=self.manager.transforms_of(self.index),
        )
        return out.to(q.dtype)
