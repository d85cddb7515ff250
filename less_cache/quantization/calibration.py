"""Bases fitted to text: KVTC's and Eigen attention's idea, for logits and outputs.

Of the keys of one KV head, M = E[q q^T] over its queries says how much an error matters: a key
that is off by e moves logits by e^T M e on average. With S the covariance of the keys and U the
eigenvectors of ``M^1/2 S M^1/2``, sorted, the channels ``y = U^T M^1/2 (k - mean)`` are
uncorrelated, and errors of y matter alike in all of them; the first get more bits
(`layout.PROFILES`). Of the values, M is what the projection behind the attention makes of them,
``W_o W_o^T``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import CodeLayout, code_layout
from .settings import Quantization
from .transforms import LayerTransforms, inverse

BENT = 2.0**-10
"""Of a channel's direction: the most that rounding may change it by."""
REGULARISATION = 1e-4
"""Added to M's and S's diagonal, as a share of its mean: directions never seen keep a basis."""


@dataclass
class Moments:
    """Sums over the vectors of each of some heads.

    Parameters
    ----------
    count
        Vectors seen.
    first
        [heads, D], their sum.
    second
        [heads, D, D], the sum of their products.
    """

    count: int
    first: Tensor
    second: Tensor

    @classmethod
    def empty(cls, heads: int, size: int) -> Moments:
        """Of nothing."""
        wide = torch.float64
        return cls(
            0, torch.zeros(heads, size, dtype=wide), torch.zeros(heads, size, size, dtype=wide)
        )

    def add(self, vectors: Tensor) -> None:
        """Take in [B, heads, N, D]."""
        rows = vectors.detach().transpose(0, 1).flatten(1, 2).to("cpu", torch.float64)
        self.count += rows.shape[1]
        self.first += rows.sum(1)
        self.second += rows.transpose(1, 2) @ rows

    @property
    def mean(self) -> Tensor:
        """[heads, D]."""
        return self.first / self.count

    @property
    def about_zero(self) -> Tensor:
        """[heads, D, D], E[x x^T]."""
        return self.second / self.count

    @property
    def covariance(self) -> Tensor:
        """[heads, D, D]."""
        return self.about_zero - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)


def fit_layer(
    quantization: Quantization,
    queries: Moments,
    keys: Moments,
    values: Moments,
    projection: Tensor,
    *,
    centred: bool = True,
) -> LayerTransforms:
    """The bases of one layer.

    Parameters
    ----------
    quantization
        For the bits.
    queries
        Of Hq heads, after the rotary embedding.
    keys, values
        Of Hkv heads.
    projection
        [hidden, Hq, D], the weights of the projection that follows the attention.
    centred
        Whether keys lose their mean; a soft cap on logits does not allow it.
    """
    size = keys.first.shape[1]
    key_layout = code_layout(quantization.transform, quantization.key_bits, size)
    value_layout = code_layout(quantization.transform, quantization.value_bits, size)
    logits, outputs, key_spread = _weights(queries, keys, projection, centred)
    key_in, key_out = _bases(key_layout, logits, key_spread)
    value_in, value_out = _bases(value_layout, outputs, values.covariance)
    return LayerTransforms(
        key_in,
        key_out,
        keys.mean.float().double() if centred else None,
        value_in,
        value_out,
        values.mean.float().double(),
    )


def inner_variances(
    queries: Moments, keys: Moments, values: Moments, projection: Tensor, *, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Variances of the keys' and the values' inner channels before steps fold into them.

    Parameters
    ----------
    queries, keys, values, projection, centred
        As of `fit_layer`.

    Returns
    -------
    keys, values
        [Hkv, D], in descending order: what an error in a channel costs if it is not stored.
    """
    logits, outputs, key_spread = _weights(queries, keys, projection, centred)
    return _spectrum(logits, key_spread)[0], _spectrum(outputs, values.covariance)[0]


def rounded(matrix: Tensor) -> Tensor:
    """Bases [heads, D, D] in 16 bits a number; in 32, where 16 would bend a channel's direction."""
    half = matrix.half().double()
    bent = (half - matrix).norm(dim=1) > BENT * matrix.norm(dim=1)
    return matrix.float().double() if bent.any() else half


def _weights(
    queries: Moments, keys: Moments, projection: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """M of keys and of values, and the keys' S, [Hkv, D, D] each."""
    kv_heads, size = keys.first.shape
    group = len(queries.first) // kv_heads
    logits = queries.about_zero.view(kv_heads, group, size, size).mean(1)
    weights = projection.to("cpu", torch.float64).view(-1, kv_heads, group, size)
    outputs = torch.einsum("ohgd,ohge->hde", weights, weights)
    return logits, outputs, keys.covariance if centred else keys.about_zero


def _spectrum(weight: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances [heads, D] and eigenvectors U of ``M^1/2 S M^1/2``, descending, and M^1/2."""
    weight, spread = _regular(weight), _regular(spread)
    levels, vectors = torch.linalg.eigh(weight)
    root = vectors @ torch.diag_embed(levels.sqrt()) @ vectors.transpose(1, 2)
    variances, channels = torch.linalg.eigh(root @ spread @ root)
    # In descending order: the first channels have the most bits.
    return variances.flip(1).clamp_min(1e-300), channels.flip(2), root


def _bases(layout: CodeLayout, weight: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """A and its inverse, [heads, D, D] each: inner channels have steps of 1."""
    variances, channels, root = _spectrum(weight, spread)
    steps = torch.from_numpy(layout.steps) * variances.sqrt()
    # Rounded, so that a file may hold it in a quarter of the bytes and its inverse not at all.
    inner = rounded(root @ channels / steps.unsqueeze(1))
    return inner, inverse(inner)


def _regular(matrix: Tensor) -> Tensor:
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    # Heads that saw nothing but zeros still need a basis.
    floor = torch.where(mean > 0, REGULARISATION * mean, torch.ones_like(mean))
    return matrix + floor * torch.eye(matrix.shape[1], dtype=matrix.dtype)
