"""Which modules of a model get the cache, and whether model and config fit each other."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...config import CacheConfig
from ..introspection import full_attention_layers, model_shapes
from .interface import PREFIX

SHAPES = ("num_layers", "query_heads", "kv_heads", "head_dim")


def unwrapped(model: Any) -> Any:
    """The transformers model in a PEFT model or in what ``torch.compile`` made of it."""
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
            continue
        base: Any = getattr(model, "get_base_model", None)
        if not isinstance(model, nn.Module) or not callable(base):
            return model
        model = base()
    return model


def check_model(model: Any) -> None:
    """Refuse models that the cache does not know how to serve.

    Raises
    ------
    TypeError
        If it is no transformers model.
    ValueError
        If it is an encoder-decoder or multimodal model, has layers that are neither full nor
        sliding-window attention or a temperature that depends on the past (Llama 4), or shares its
        configuration with an attached model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a transformers model, alone, in a PEFT "
            "model or compiled by torch.compile"
        )
    config = model.config
    kind = config.model_type
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"model: {kind} is not a decoder of text alone; attach to its language model instead"
        )
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"model: {kind} has no num_hidden_layers; LessCache needs a decoder")
    if getattr(config, "attn_temperature_tuning", False):
        raise ValueError(
            f"model: {kind} is not supported: the temperature of its attention depends on the past "
            "length, for which it asks its cache in the midst of a layer"
        )
    layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"model: layer {i} of {kind} keeps a {type(layer).__name__}, but LessCache knows "
                "only full and sliding-window attention"
            )
    own = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if full_attention_layers(config) != own:
        raise ValueError(f"model: {kind} does not say which of its layers have a sliding window")
    if str(config._attn_implementation).startswith(PREFIX):
        raise ValueError(
            "model: its configuration object is that of a model already attached; build each model "
            "from a configuration of its own"
        )


def attention_modules(model: Any) -> list[Any]:
    """The attention modules of the full-attention layers, in order.

    Raises
    ------
    ValueError
        If the model's attention is not of Llama's kind, or is not causal.
    """
    config = model.config
    kind = config.model_type
    full = full_attention_layers(config)
    if kind == "falcon":
        return [layer.self_attention for layer in model.base_model.h]
    found: dict[int, Any] = {}
    for module in model.base_model.modules():
        # What Llama's attention and its many descendants have in common, and latent, sink and
        # cross attention have not.
        ours = all(hasattr(module, name) for name in ("layer_idx", "scaling", "is_causal"))
        keys = hasattr(module, "k_proj") or hasattr(module, "qkv_proj")
        if ours and keys and not hasattr(module, "sinks") and module.layer_idx in full:
            if module.layer_idx in found:
                raise ValueError(f"model: layer {module.layer_idx} of {kind} has two attentions")
            found[module.layer_idx] = module
    if sorted(found) != full or not model._can_set_attn_implementation():
        raise ValueError(
            f"model: {kind} is not supported: its attention modules are not built as Llama's are"
        )
    for i, module in found.items():
        if not module.is_causal or module.config is not model.base_model.config:
            raise ValueError(f"model: layer {i} of {kind} is not plain causal attention")
    return [found[i] for i in full]


def decoder_of(model: Any, modules: list[Any]) -> Any:
    """The part of the model that runs the layers: what embeds, masks, and holds all `modules`.

    It need not be ``model.base_model``: some heads call a model further in directly.
    """
    found = model
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and set(modules) <= set(part.modules()):
            found = part
    return found


def check_fit(model: Any, modules: list[Any], config: CacheConfig) -> None:
    """Refuse a config that is not the model's.

    Raises
    ------
    TypeError
        If it is no `CacheConfig`.
    ValueError
        If a shape or the scale differs, or the attention layers sit on several devices.
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
    kind = model.config.model_type
    shapes = model_shapes(model.config)
    wrong = [
        f"{name} = {getattr(config, name)}, but {kind} has {shapes[name]}"
        for name in SHAPES
        if getattr(config, name) != shapes[name]
    ]
    for i, module in enumerate(modules):
        scale = getattr(module, "scaling", module.head_dim**-0.5)
        if not math.isclose(scale, config.layer(min(i, config.num_layers - 1)).scale, rel_tol=1e-5):
            wrong.append(f"scale = {config.scale}, but {kind} has {scale}")
            break
    if wrong:
        raise ValueError("config: " + "; ".join(wrong))
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: its attention layers are on {names}; LessCache needs one device")


def model_device(modules: list[Any]) -> Any:
    """The device that the attention layers are on."""
    return next(modules[0].parameters()).device
