"""Bases of codes fitted to a model's own queries, keys and values on text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._checks import check_int
from ..config import CacheConfig
from ..integrations.transformers.interception import intercepted
from ..integrations.transformers.model_check import attention_modules, check_fit, check_model
from ..quantization.calibration import Moments, fit_layer
from ..quantization.transforms import Transforms
from .collect import full_attention, output_projection


def calibrate(
    model: Any, config: CacheConfig, tokens: Tensor, *, batch: int = 4, progress: bool = True
) -> Transforms:
    """Fit the bases in which a model's pairs are coded: one pass over some text.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    config
        Its `quantization` says for how many bits.
    tokens
        [n, N] token ids, no padding. Some 20,000 tokens are enough.
    batch
        Sequences a forward pass.
    progress
        Show a bar.

    Raises
    ------
    ValueError, TypeError
        If the config has no quantization with calibrated bases, it is for another model, there is
        no text, or the model makes numbers of it that are none.
    """
    quantization = config.quantization
    if quantization is None or quantization.transform != "calibrated":
        raise ValueError(
            f"config: quantization is {quantization!r}, expected one with transform='calibrated'"
        )
    sums = collect_moments(model, config, tokens, batch=batch, progress=progress)
    modules = attention_modules(model)
    layers = []
    for spec, moments, module in zip(config.layers, sums, modules, strict=True):
        queries, keys, values = moments
        projection = output_projection(module, spec)
        centred = spec.softcap is None
        layers.append(fit_layer(quantization, queries, keys, values, projection, centred=centred))
    return Transforms(
        "calibrated",
        layers,
        key_bits=quantization.key_bits,
        value_bits=quantization.value_bits,
    )


def collect_moments(
    model: Any, config: CacheConfig, tokens: Tensor, *, batch: int = 4, progress: bool = True
) -> list[list[Moments]]:
    """Moments of the queries, keys and values of every layer: one pass over some text.

    Parameters
    ----------
    model, config, tokens, batch, progress
        As of `calibrate`.

    Raises
    ------
    ValueError, TypeError
        If the config is for another model, there is no text, or the model makes numbers of it that
        are none.
    """
    check_int("batch", batch, minimum=1)
    if not tokens.numel():
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [n, N] token ids")
    check_model(model)
    modules = attention_modules(model)
    check_fit(model, modules, config)
    size = config.head_dim
    sums = [
        [Moments.empty(heads, size) for heads in (spec.query_heads, spec.kv_heads, spec.kv_heads)]
        for spec in config.layers
    ]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for moments, vectors in zip(sums[layer], (q, k, v), strict=True):
            moments.add(vectors)
        return full_attention(config.layer(layer), q, k, v)

    bar = tqdm(total=len(tokens), desc="calibrate", unit="seq", disable=not progress)
    with torch.no_grad(), intercepted(model, attend), bar:
        for start in range(0, len(tokens), batch):
            ids = tokens[start : start + batch].to(model.device)
            model(ids, use_cache=False)
            bar.update(len(ids))
    for index, layer in enumerate(sums):
        if not all(bool(entry.second.isfinite().all()) for entry in layer):
            raise ValueError(
                f"model: its queries, keys or values in layer {index} are not finite in "
                f"{model.dtype}; load it in a wider dtype"
            )
    return sums
