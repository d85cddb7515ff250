"""A transformers model all of whose attention layers call a function of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from less_cache.config import CacheConfig, full_attention_layers
from less_cache.integrations.falcon import check_falcon, falcon_forward
from less_cache.integrations.interface import LAYER, register
from less_cache.integrations.model_check import (
    attention_modules,
    check_fit,
    check_model,
    decoder_of,
)
from less_cache.policies import SinkWindow

from .parts import Layer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer of the model, q [B, Hq, S, D], k and v [B, Hkv, S, D]) -> [B, Hq, S, D]."""


@dataclass
class _Caller:
    """What the attention function finds in the place of a cache's layer."""

    index: int
    config: CacheConfig
    function: Attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.function(self.index, q, k, v)


def model_layers(model: Any, config: CacheConfig, kind: str | None) -> list[Layer]:
    """Each of the model's layers as an exported one.

    A sliding-window layer is a cache of as many slots as its window that lets the oldest pair go
    and remembers nothing of it.

    Parameters
    ----------
    model
        A transformers model that `less_cache.attach` takes.
    config
        Of its full-attention layers.
    kind
        Of their maps.

    Raises
    ------
    TypeError, ValueError
        If the model is none of those, or the config does not fit it.
    """
    check_model(model)
    if model.config.model_type == "falcon":
        check_falcon(model.config)
    modules = attention_modules(model)
    check_fit(model, modules, config)
    full = full_attention_layers(model.config)
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    if softcap != config.softcap:
        raise ValueError(f"config: softcap = {config.softcap}, but the model has {softcap}")
    layers = []
    for i in range(model.config.num_hidden_layers):
        if i in full:
            layers.append(Layer(config.layer(full.index(i)), kind))
        else:
            window = int(model.config.sliding_window)
            sliding = config.replace(capacity=window, policy=SinkWindow(sinks=0), rank=0)
            layers.append(Layer(sliding.layer(0), None, window))
    return layers


@contextlib.contextmanager
def intercepted(model: Any, config: CacheConfig, attend: Attend) -> Iterator[None]:
    """Let `attend` compute the attention of every layer, within the block.

    Parameters
    ----------
    model
        One that `model_layers` takes; call it with ``use_cache=False``.
    config
        Of its full-attention layers.
    attend
        Called for each layer of the model in order.
    """
    full = attention_modules(model)
    modules = {module.layer_idx: module for module in [*full, *_sliding_modules(model)]}
    with contextlib.ExitStack() as undo:
        for index, module in sorted(modules.items()):
            caller = _Caller(index, config, attend)
            if model.config.model_type == "falcon":
                undo.callback(module.__dict__.pop, "forward", None)
                module.forward = falcon_forward(module, lambda *_, caller=caller: (caller, None))
            else:
                undo.callback(_hand_on(module, caller).remove)
        decoder = decoder_of(model, full)
        original = decoder.config._attn_implementation
        undo.callback(setattr, decoder.config, "_attn_implementation", original)
        if model.config.model_type != "falcon":
            decoder.config._attn_implementation = register(original)
        yield


def _sliding_modules(model: Any) -> list[Any]:
    """The attention modules of the layers that have a sliding window."""
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
            "attention is not built as Llama's is; only such layers can be exported"
        )
    return list(found.values())


def _hand_on(module: Any, caller: _Caller) -> Any:
    def add(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Who attends knows what is padding; the mask drawn for the layer is nobody's then.
        return args, {**kwargs, LAYER: caller, "attention_mask": None}

    return module.register_forward_pre_hook(add, with_kwargs=True)
