"""A model whose attention layers call a function of ours instead of attending themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...config import CacheConfig
from ...policies import FullCache
from ..introspection import full_attention_layers
from .falcon import check_falcon, falcon_forward
from .interface import LAYER, register
from .model_check import attention_modules, check_model, decoder_of, unwrapped

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, D]) -> [B, Hq, N, D]."""


class Enough(Exception):  # noqa: N818
    """What `attend` raises to end a forward pass that has shown all that was wanted."""


@dataclass
class _Layer:
    """What the attention function finds in the place of a cache's layer."""

    index: int
    config: CacheConfig
    function: Attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and not bool(mask.all()):
            raise ValueError("attention_mask: has padding, but whole sequences are expected here")
        return self.function(self.index, q, k, v)


@contextlib.contextmanager
def intercepted(
    model: Any,
    attend: Attend,
    *,
    config: CacheConfig | None = None,
    sliding: bool = False,
    padding: bool = False,
) -> Iterator[None]:
    """Let `attend` compute the attention of whole sequences, within the block.

    Call the model with ``use_cache=False``.

    Parameters
    ----------
    model
        As of `attach`.
    attend
        Called for each full-attention layer, counted from 0, in order.
    config
        Of those layers, whose scale is compared with the model's. Default: the model's own.
    sliding
        Also of the layers with a sliding window, and all counted as the model counts them;
        otherwise those attend as ever.
    padding
        `attend` knows what is padding, and no mask is drawn for the layer; otherwise
        padding is refused.

    Raises
    ------
    TypeError, ValueError
        If the model is not one that `attach` takes, or a sliding layer is not built as Llama's.
    """
    model = unwrapped(model)
    check_model(model)
    full = attention_modules(model)
    if config is None:
        config = CacheConfig.from_model(model.config, capacity=1, policy=FullCache(), rank=0)
    modules = dict(enumerate(full))
    if sliding:
        every = [*full, *sliding_modules(model)]
        modules = {module.layer_idx: module for module in every}
    with contextlib.ExitStack() as undo:
        if falcon := model.config.model_type == "falcon":
            check_falcon(model.config)
        for index, module in sorted(modules.items()):
            layer = _Layer(index, config, attend)
            if falcon:
                undo.callback(module.__dict__.pop, "forward", None)
                module.forward = falcon_forward(module, lambda *_, layer=layer: (layer, None))
            else:
                undo.callback(_hand_on(module, layer, padding).remove)
        if not falcon:
            decoder = decoder_of(model, full)
            original = decoder.config._attn_implementation
            undo.callback(setattr, decoder.config, "_attn_implementation", original)
            decoder.config._attn_implementation = register(original)
        yield


def sliding_modules(model: Any) -> list[Any]:
    """The attention modules of the layers that have a sliding window.

    Raises
    ------
    ValueError
        If such a layer's attention is not built as Llama's.
    """
    if model.config.model_type == "falcon":
        return []
    full = full_attention_layers(model.config)
    found = {
        module.layer_idx: module
        for module in model.base_model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
        if module.layer_idx not in full
    }
    missing = model.config.num_hidden_layers - len(full) - len(found)
    if missing:
        raise ValueError(
            f"model: {model.config.model_type} has {missing} sliding-window layer(s) whose "
            "attention is not built as Llama's is; only such layers can be taken over"
        )
    return list(found.values())


def _hand_on(module: Any, layer: _Layer, padding: bool) -> Any:
    unmasked = {"attention_mask": None} if padding else {}

    def add_layer(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, LAYER: layer, **unmasked}

    return module.register_forward_pre_hook(add_layer, with_kwargs=True)
