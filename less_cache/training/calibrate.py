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
from ..quantization.settings import Bits
from ..quantization.transforms import LayerTransforms, Transforms
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
        Its `quantization` says for how many bits; layers that have no calibrated bases get none.
    tokens
        [n, N] token ids, no padding. Some 20,000 tokens are enough.
    batch
        Sequences a forward pass.
    progress
        Show a bar.

    Raises
    ------
    ValueError, TypeError
        If no layer of the config has calibrated bases, it is for another model, there is
        no text, or the model makes numbers of it that are none.
    """
    wanted = [
        codes if codes is not None and codes.transform == "calibrated" else None
        for codes in config.quantizations
    ]
    if not any(wanted):
        raise ValueError(
            f"config: quantization is {config.quantization!r}, expected one with "
            "transform='calibrated'"
        )
    sums = collect_moments(model, config, tokens, batch=batch, progress=progress)
    modules = attention_modules(model)
    layers: list[LayerTransforms | None] = []
    for codes, spec, (q, k, v), module in zip(wanted, config.layers, sums, modules, strict=True):
        if codes is None:
            layers.append(None)
            continue
        projection = output_projection(module, spec)
        layers.append(fit_layer(codes, q, k, v, projection, centred=spec.softcap is None))
    return Transforms(
        "calibrated",
        layers,
        key_bits=[_average(0 if codes is None else codes.key_bits) for codes in wanted],
        value_bits=[_average(0 if codes is None else codes.value_bits) for codes in wanted],
    )


def _average(bits: Bits) -> int:
    """What transforms note of the bits they are for; nothing of those by eighth."""
    return bits if isinstance(bits, int) else 0


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
