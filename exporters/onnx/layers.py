"""The layers of a transformers model, as the exporter sees them."""

from __future__ import annotations

from typing import Any

from exporters.common.heads import exported_layer
from less_cache.config import CacheConfig
from less_cache.integrations.introspection import full_attention_layers
from less_cache.integrations.transformers.falcon import check_falcon
from less_cache.integrations.transformers.model_check import (
    attention_modules,
    check_fit,
    check_model,
)
from less_cache.layer_config import LayerConfig
from less_cache.policies import SinkWindow

from .heads import ModelLayer


def model_layers(model: Any, config: CacheConfig, kind: str | None) -> list[ModelLayer]:
    """Describe each layer of a model for the export.

    A sliding-window layer becomes a cache with as many slots as its window, which drops the oldest
    pair and remembers nothing of it.

    Parameters
    ----------
    model
        A transformers model that `less_cache.attach` takes.
    config
        That of its full-attention layers.
    kind
        The kind of their maps.

    Raises
    ------
    TypeError, ValueError
        If the model is not supported, or the config does not fit it.
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
            own = exported_layer(config, full.index(i))
            layers.append(ModelLayer(i, own, kind if own.rank else None))
        else:
            window = int(model.config.sliding_window)
            layers.append(ModelLayer(i, sliding_layer(config, window), None, window))
    return layers


def sliding_layer(config: CacheConfig, window: int) -> LayerConfig:
    """A sliding-window layer as a cache: it drops the oldest pair, and stores pairs as they are."""
    policy = SinkWindow(sinks=0)
    return config.replace(capacity=window, policy=policy, rank=0, quantization=None).layer(0)
