"""A model whose full-attention layers call a function of ours instead of attending themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..config import CacheConfig
from ..policies import FullCache
from .interface import LAYER, register
from .model_check import attention_modules, check_model

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, D]) -> [B, Hq, N, D]."""


@dataclass(frozen=True)
class _Layer:
    index: int
    function: Attend
    cache: Any

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask: has padding, but whole sequences are expected here")
        return self.function(self.index, q, k, v)


@contextlib.contextmanager
def intercepted(model: Any, attend: Attend) -> Iterator[None]:
    """Let `attend` compute the attention of whole sequences, within the block.

    Call the model with ``use_cache=False`` and without padding. Layers with a sliding window
    attend as ever.

    Parameters
    ----------
    model
        As of `attach`.
    attend
        Called for each full-attention layer, counted from 0, in order.

    Raises
    ------
    TypeError, ValueError
        If the model is not one that `attach` takes.
    """
    check_model(model)
    decoder = model.base_model
    config = CacheConfig.from_model(model.config, capacity=1, policy=FullCache(), rank=0)
    cache = SimpleNamespace(manager=SimpleNamespace(config=config))
    with contextlib.ExitStack() as undo:
        for index, module in enumerate(attention_modules(model)):
            layer = _Layer(index, attend, cache)

            def hand_on(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: _Layer = layer
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                return args, {**kwargs, LAYER: layer}

            undo.callback(module.register_forward_pre_hook(hand_on, with_kwargs=True).remove)
        original = decoder.config._attn_implementation
        undo.callback(setattr, decoder.config, "_attn_implementation", original)
        decoder.config._attn_implementation = register(original)
        yield
