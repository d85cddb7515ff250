"""The attention and mask functions that an attached model finds in transformers' registries.

They are registered under a name made of the implementation they stand in for, so that what is not
theirs (a sliding-window layer, a pass without a cache) goes to that one unchanged.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...config import CacheConfig

PREFIX = "less_cache_"
"""What the names of our implementations start with."""

LAYER = "less_cache_layer"
"""The keyword by which an attention module hands its `AttentionLayer` on."""

UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "score_mod", "block_mask")
"""Keywords of attention functions that change the logits in a way the cache does not know."""


class AttentionLayer(Protocol):
    """Who attends in place of an attention module: a cache's layer, or a function of ours."""

    index: int

    @property
    def config(self) -> CacheConfig:
        """The shapes and the scale that it attends with."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, Hq, S, D] from q [B, Hq, S, D], k and v [B, Hkv, S, D], mask [B, S]."""


def register(original: str) -> str:
    """Register our functions over the implementation `original`; the name they go by."""
    name = PREFIX + original

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = kwargs.pop(LAYER, None)
        if layer is None:
            return _run_original(original, module, query, key, value, attention_mask, kwargs)
        return _run_layer(layer, module, query, key, value, attention_mask, kwargs), None

    def mask(**kwargs: Any) -> Any:
        # A full-attention layer needs only to know what is padding: [B, total], or None. A window,
        # or whatever else a model adds, is the original's to draw.
        if kwargs.get("mask_function") is causal_mask_function:
            return kwargs.get("attention_mask")
        return ALL_MASK_ATTENTION_FUNCTIONS[original](**kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _run_layer(
    layer: AttentionLayer,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """[B, S, Hq, D] from the cache."""
    model_type = module.config.model_type
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"{model_type}: its attention is more than causal with padding, which LessCache is for"
        )
    if kwargs.get("dropout"):
        raise ValueError(
            f"dropout: got {kwargs['dropout']}, expected 0 with LessCache; call model.eval()"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{model_type}: its attention uses {name}; LessCache cannot")
    _check_logits(layer.config, module, kwargs)
    mask = None if attention_mask is None else attention_mask[:, -query.shape[2] :]
    return layer.attend(query, key, value, mask).transpose(1, 2).contiguous()


def _check_logits(config: CacheConfig, module: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a model whose logits are not those of the config, whatever its modules say."""
    model_type = module.config.model_type
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    if scale is not None and not math.isclose(scale, config.layer(0).scale, rel_tol=1e-5):
        raise ValueError(f"config: scale = {config.scale}, but {model_type} attends with {scale}")
    if softcap != config.softcap:
        raise ValueError(f"config: softcap = {config.softcap}, but {model_type} has {softcap}")


def _run_original(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The layer as it is without us, with the mask that our mask function kept from it."""
    if "flash" not in original and (attention_mask is None or attention_mask.ndim == 2):
        length, total = query.shape[2], key.shape[2]
        attention_mask = ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=query.shape[0],
            q_length=length,
            kv_length=total,
            q_offset=total - length,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=True,
            dtype=query.dtype,
            config=module.config,
            use_vmap=False,
            device=query.device,
        )
    # transformers keeps "eager" in each model's own file instead of the registry.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
    return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
