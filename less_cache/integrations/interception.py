"""A model whose full-attention layers call a function of ours instead of attending themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import CacheConfig
from ..policies import FullCache
from .falcon import check_falcon, falcon_forward
from .interface import LAYER, register
from .model_check import attention_modules, check_model, decoder_of

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, D]) -> [B, Hq, N, D]."""


@dataclass
class _Layer:
    index: int
    config: CacheConfig
    function: Attend

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
    modules = attention_modules(model)
    config = CacheConfig.from_model(model.config, capacity=1, policy=FullCache(), rank=0)
    layers = [_Layer(index, config, attend) for index in range(len(modules))]
    with contextlib.ExitStack() as undo:
        if model.config.model_type == "falcon":
            check_falcon(model.config)
            for module, layer in zip(modules, layers, strict=True):
                undo.callback(module.__dict__.pop, "forward", None)
                module.forward = falcon_forward(module, lambda *_, layer=layer: (layer, None))
        else:
            for module, layer in zip(modules, layers, strict=True):
                undo.callback(_hand_on(module, layer).remove)
            decoder = decoder_of(model, modules)
            original = decoder.config._attn_implementation
            undo.callback(setattr, decoder.config, "_attn_implementation", original)
            decoder.config._attn_implementation = register(original)
        yield


def _hand_on(module: Any, layer: _Layer) -> Any:
    def add_layer(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, LAYER: layer}

    return module.register_forward_pre_hook(add_layer, with_kwargs=True)
