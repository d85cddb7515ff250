"""Bases of codes for any bits, from one pass over some text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig
from ..integrations.transformers.model_check import attention_modules, unwrapped
from ..quantization import Quantization
from ..quantization.calibration import Moments, fit_layer, inner_variances
from ..quantization.profiles import profile_for
from ..quantization.transforms import LayerTransforms
from ..training.calibrate import collect_moments
from ..training.collect import output_projection

AVERAGES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Bits a number, on average, that are tried for keys and for values."""


@dataclass(frozen=True)
class LayerBases:
    """What one layer's bases are fitted from.

    Parameters
    ----------
    queries, keys, values
        Their moments.
    projection
        [hidden, Hq, D], the weights of the projection that follows the attention.
    centred
        Whether keys lose their mean.
    """

    queries: Moments
    keys: Moments
    values: Moments
    projection: Tensor
    centred: bool

    def fitted(self, quantization: Quantization) -> LayerTransforms:
        """The bases for so many bits."""
        return fit_layer(
            quantization,
            self.queries,
            self.keys,
            self.values,
            self.projection,
            centred=self.centred,
        )

    def profiles(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Bits of keys and of values for each of `AVERAGES`, for this layer's channels."""
        keys, values = inner_variances(
            self.queries, self.keys, self.values, self.projection, centred=self.centred
        )
        return [(profile_for(keys, average), profile_for(values, average)) for average in AVERAGES]


def bases_of(
    model: Any, config: CacheConfig, tokens: Tensor, *, progress: bool = True
) -> list[LayerBases]:
    """What every layer's bases are fitted from: one pass over the text.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    config
        Its shapes.
    tokens
        [n, N] token ids, no padding.
    progress
        Show a bar.
    """
    sums = collect_moments(model, config, tokens, progress=progress)
    modules = attention_modules(unwrapped(model))
    return [
        LayerBases(q, k, v, output_projection(module, spec).float().cpu(), spec.softcap is None)
        for spec, (q, k, v), module in zip(config.layers, sums, modules, strict=True)
    ]


def to_tensors(bases: list[LayerBases]) -> dict[str, Tensor]:
    """All of them as tensors by name, for a file."""
    found = {}
    for index, own in enumerate(bases):
        for name in ("queries", "keys", "values"):
            moments: Moments = getattr(own, name)
            found[f"{index}.{name}.count"] = torch.tensor(moments.count)
            found[f"{index}.{name}.first"] = moments.first
            found[f"{index}.{name}.second"] = moments.second
        found[f"{index}.projection"] = own.projection
        found[f"{index}.centred"] = torch.tensor(own.centred)
    return found


def from_tensors(tensors: dict[str, Tensor]) -> list[LayerBases]:
    """What `to_tensors` took apart."""
    count = len({name.partition(".")[0] for name in tensors})
    found = []
    for index in range(count):
        q, k, v = (
            Moments(
                int(tensors[f"{index}.{name}.count"]),
                tensors[f"{index}.{name}.first"],
                tensors[f"{index}.{name}.second"],
            )
            for name in ("queries", "keys", "values")
        )
        projection = tensors[f"{index}.projection"]
        found.append(LayerBases(q, k, v, projection, bool(tensors[f"{index}.centred"])))
    return found
