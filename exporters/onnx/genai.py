"""A folder that ``onnxruntime_genai.Model`` loads and runs unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.common.folders import check_target, replaced_files
from exporters.common.manifest import MODEL
from less_cache._files import write_text
from less_cache.config import CacheConfig
from less_cache.feature_maps import FeatureMaps
from less_cache.integrations.introspection import full_attention_layers
from less_cache.integrations.transformers.model_check import check_model
from less_cache.quantization.transforms import Transforms

from .export import GENAI_CONFIG, INDICES, Prepared, earlier_files, prepare, save
from .packing import PAST, PRESENT, hide_padding, pack_state

DTYPES = ("float32", "float16")
MOST_TOKENS = 2**24 - 1
"""The packed state holds lengths and positions plus one in float32, which is exact up to 2^24."""


def export_genai(
    model: Any,
    config: CacheConfig,
    maps: FeatureMaps | None,
    out_dir: str | Path,
    *,
    dtype: Any = None,
    opset: int = 23,
    tokenizer: Any = None,
    transforms: Transforms | None = None,
    force: bool = False,
) -> Path:
    """Write a model with its cache for onnxruntime-genai.

    The library keeps the state like that of a recurrent model: two tensors a layer, whose size
    does not grow. Prompts, steps, batches and later turns work as with any model. Beams and
    rewinding do not: what was evicted does not come back. A batch's prompts may be padded on the
    left if the model has a padding token that differs from the token that texts begin with. The
    library's mask does not mark padding, so the file itself looks for that token.

    Parameters
    ----------
    model, config, maps, out_dir, dtype, opset, tokenizer, transforms, force
        See `export_decoder`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TypeError, ValueError
        If the model is not supported, an argument does not fit it, or the folder holds something
        else than an earlier export. Nothing is written then.
    """
    check_target(Path(out_dir), INDICES, force)
    _check_dtypes(model, config)
    prepared = prepare(
        model, config, maps, transforms, dtype=dtype, opset=opset, all_logits=False, dtypes=DTYPES
    )
    pad, bos = (getattr(model.generation_config, f"{name}_token_id") for name in ("pad", "bos"))
    if pad is not None and pad != bos:
        hide_padding(prepared.graph, pad)
    pack_state(prepared.graph, prepared.layers)
    with replaced_files(Path(out_dir), GENAI_CONFIG, earlier_files(Path(out_dir))) as folder:
        save(prepared, folder, tokenizer)
        write_text(folder / GENAI_CONFIG, json.dumps(_config(prepared), indent=2) + "\n")
    return Path(out_dir)


def _check_dtypes(model: Any, config: CacheConfig) -> None:
    """Refuse layers with codes beside others: the library keeps all states in one dtype."""
    if not isinstance(config, CacheConfig) or not config.has_codes:
        return
    plain = [i for i, codes in enumerate(config.quantizations) if codes is None]
    if plain:
        raise ValueError(
            f"config: quantization is None in layer {plain[0]}, but not in all, and "
            "onnxruntime-genai keeps the states of all layers in one dtype; export the format "
            "onnx, or with codes in every layer"
        )
    check_model(model)
    windows = set(range(model.config.num_hidden_layers)) - set(full_attention_layers(model.config))
    if windows:
        raise ValueError(
            f"config: quantization is {config.quantization}, but layer {min(windows)} has a "
            "sliding window, whose pairs are stored as they are, and onnxruntime-genai keeps the "
            "states of all layers in one dtype; export the format onnx, or without quantization"
        )


def _config(prepared: Prepared) -> dict[str, Any]:
    model, config = prepared.model, prepared.config
    text = model.config.get_text_config()
    generation = model.generation_config
    eos = generation.eos_token_id
    first = eos[0] if isinstance(eos, list) else eos
    bos, pad = generation.bos_token_id, generation.pad_token_id
    length = min(getattr(text, "max_position_embeddings", None) or 2**20, MOST_TOKENS)
    return {
        "model": {
            # The library's name for any decoder in one file; it does not look at the layers.
            "type": "llama",
            "vocab_size": text.vocab_size,
            "context_length": length,
            "bos_token_id": first if bos is None else bos,
            "eos_token_id": eos if eos is not None else text.vocab_size,
            "pad_token_id": pad if pad is not None else first or 0,
            "decoder": {
                "session_options": {"log_id": "less_cache", "provider_options": []},
                "filename": MODEL,
                "head_size": config.head_dim,
                "hidden_size": text.hidden_size,
                "num_attention_heads": config.query_heads,
                "num_key_value_heads": config.kv_heads,
                "num_hidden_layers": len(prepared.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_conv_names": f"{PAST}.%d.conv_state",
                    "past_recurrent_names": f"{PAST}.%d.recurrent_state",
                },
                "outputs": {
                    "logits": "logits",
                    "present_conv_names": f"{PRESENT}.%d.conv_state",
                    "present_recurrent_names": f"{PRESENT}.%d.recurrent_state",
                },
            },
        },
        "search": {"max_length": length, "do_sample": False, "past_present_share_buffer": False},
    }
