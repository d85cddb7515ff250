"""Falcon, whose attention does not go through transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from .cache import LessCache
from .interface import AttentionLayer


def check_falcon(model_config: Any) -> None:
    """Refuse the variant whose positions are added to the logits.

    Raises
    ------
    ValueError
        If the model uses ALiBi.
    """
    if model_config.alibi:
        raise ValueError(
            "model: falcon with alibi = True adds a term for each distance to its logits, which an "
            "evicted pair has none of; LessCache needs rotary embeddings (alibi = False)"
        )


def falcon_mask(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, 1, 1, `length` or more]: a mask that Falcon hands on to its layers as it is.

    From any other it would draw a [B, 1, S, total] one, which nobody would read.
    """
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    return mask[:, None, None, :]


Find = Callable[[Any, Tensor | None, int], tuple[AttentionLayer, Tensor | None] | None]
"""(layer_past, attention_mask, new tokens) -> who attends, and its mask [B, S]; or nobody."""


def cached_layer(module: Any, alone: AttentionLayer | None) -> Find:
    """The layer of the `LessCache` that `module` is given; where it is given none, `alone`."""

    def find(
        past: Any, mask: Tensor | None, length: int
    ) -> tuple[AttentionLayer, Tensor | None] | None:
        layer = past.layers[module.layer_idx] if isinstance(past, LessCache) else alone
        if layer is None or mask is None:
            return None
        return layer, mask[:, 0, 0, -length:].to(torch.bool)

    return find


def falcon_forward(module: Any, find: Find) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A forward for `module` that lets what `find` finds attend, and else is the module's own."""
    original = module.forward

    def forward(
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        found = find(layer_past, attention_mask, hidden_states.shape[1])
        if found is None:
            return original(
                hidden_states,
                alibi,
                attention_mask,
                position_ids=position_ids,
                layer_past=layer_past,
                use_cache=use_cache,
                output_attentions=output_attentions,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        query, key, value = _split_heads(module, module.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        layer, mask = found
        out = layer.attend(query, key, value, mask)
        return module.dense(out.transpose(1, 2).flatten(2)), None

    return forward


def _split_heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Hq, S, D]; keys and values [B, Hkv, S, D], not repeated for query heads."""
    batch, length, _ = fused.shape
    if not module.new_decoder_architecture and not module.multi_query:
        heads = fused.view(batch, length, module.num_heads, 3, module.head_dim)
        query, key, value = heads.unbind(3)
    else:
        # One group for each KV head: its query heads, then its key, then its value.
        groups = fused.view(batch, length, module.num_kv_heads, -1, module.head_dim)
        query = groups[:, :, :, :-2].flatten(2, 3)
        key, value = groups[:, :, :, -2], groups[:, :, :, -1]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
