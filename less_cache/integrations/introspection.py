"""What a transformers configuration says of its model's caches; only its attributes are read."""

from __future__ import annotations

import json
from typing import Any

from ..dtypes import dtype_name


def model_shapes(model_config: Any) -> dict[str, Any]:
    """The parameters of `CacheConfig` that a transformers configuration determines."""
    text = model_config
    if callable(getattr(model_config, "get_text_config", None)):
        text = model_config.get_text_config()
    query_heads = _attribute(text, "num_attention_heads", "n_head")
    kv_heads = query_heads
    if getattr(text, "model_type", "") == "falcon":
        if not text.new_decoder_architecture and text.multi_query:
            kv_heads = 1
        else:
            kv_heads = text.num_kv_heads or query_heads
    else:
        kv_heads = getattr(text, "num_key_value_heads", None) or query_heads
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None:
        head_dim = _attribute(text, "hidden_size") // query_heads
    shapes: dict[str, Any] = {
        "num_layers": len(full_attention_layers(text)),
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": getattr(text, "max_position_embeddings", None),
        "softcap": getattr(text, "attn_logit_softcapping", None),
    }
    if getattr(text, "query_pre_attn_scalar", None) is not None:
        shapes["scale"] = text.query_pre_attn_scalar**-0.5
    elif getattr(text, "attention_multiplier", None) is not None:
        shapes["scale"] = text.attention_multiplier
    dtype = getattr(text, "dtype", None)
    if dtype is not None:
        shapes["dtype"] = dtype_name(dtype)
    return shapes


def full_attention_layers(model_config: Any) -> list[int]:
    """Indices of the model's layers that attend over everything: those that get a LESS cache.

    Raises
    ------
    ValueError
        If there is none, because every layer has a sliding window or another kind of attention.
    """
    count = _attribute(model_config, "num_hidden_layers", "n_layer")
    types = getattr(model_config, "layer_types", None)
    if types is None:
        sliding = getattr(model_config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * count
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    others = sorted(set(types) - {"full_attention", "sliding_attention"})
    if not full and others:
        raise ValueError(
            "model_config: no layer attends over everything, so there is no cache to hold; its "
            f"layers are of the kinds {', '.join(map(str, others))}"
        )
    if not full:
        raise ValueError(
            "model_config: every layer has a sliding window, so no layer's cache grows; "
            "set sliding_window=None in the model's configuration to let LESS hold the past instead"
        )
    return full


def _attribute(model_config: Any, *names: str) -> Any:
    for name in names:
        if getattr(model_config, name, None) is not None:
            return getattr(model_config, name)
    raise ValueError(
        f"model_config: {type(model_config).__name__} has no attribute {' or '.join(names)}"
    )


IDENTITY = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rope_parameters",
)
"""What tells models with caches of the same shapes apart, besides `model_shapes`."""


def description(model_config: Any) -> dict[str, Any]:
    """What tells a model from others, JSON-ready: for `CacheRecipe`.

    Its name, by which its folder or repository went, and what its configuration says of the
    computation. Two trainings of one architecture are told apart by their names alone.
    """
    text = model_config
    if callable(getattr(model_config, "get_text_config", None)):
        text = model_config.get_text_config()
    found = model_shapes(model_config)
    # The dtype is how it was loaded, not which model it is.
    found.pop("dtype", None)
    found |= {name: getattr(text, name) for name in IDENTITY if getattr(text, name, None)}
    name = getattr(model_config, "_name_or_path", "") or None
    return {"name": name, **json.loads(json.dumps(found))}
