"""φ and ψ of one layer: parameters, formulas, start values.

Two kinds, of equal cost and state. ``"paper"`` is LESS's own (arXiv 2402.09398, section 3.2)::

    φ(q) = | gelu(gelu(q W1) W2) |
    ψ(k) = | u + (u W3) * s2 |,    u = |s1| * gelu(gelu(k V1) V2)

and ``"exp"`` fits a trained model better::

    φ(q) = exp(clamp(gelu(q W1) W2, ±30))
    ψ(k) = exp(clamp(gelu(k V1) V2 + b, ±30))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._checks import check_choice, check_dense

EXPONENT_LIMIT = 30.0
"""Largest exponent of the ``"exp"`` kind: φ·z then stays finite in float32 for any length."""

FIRST_LAYERS = ("phi_w1", "phi_w2", "psi_w1", "psi_w2")
LAST_LAYERS = {"paper": ("psi_w3", "psi_s1", "psi_s2"), "exp": ("psi_b",)}
"""By kind: the parameters besides `FIRST_LAYERS`. They act on R numbers, and stay float32."""


def tensor_shapes(
    kind: str, *, query_heads: int, kv_heads: int, head_dim: int, hidden: int, rank: int
) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of one layer's maps, by name.

    Raises
    ------
    ValueError
        If `kind` is unknown.
    """
    check_choice("kind", kind, LAST_LAYERS)
    shapes: dict[str, tuple[int, ...]] = {
        "phi_w1": (query_heads, head_dim, hidden),
        "phi_w2": (query_heads, hidden, rank),
        "psi_w1": (kv_heads, head_dim, hidden),
        "psi_w2": (kv_heads, hidden, rank),
    }
    for name in LAST_LAYERS[kind]:
        shapes[name] = (kv_heads, rank, rank) if name == "psi_w3" else (kv_heads, rank)
    return shapes


@dataclass(frozen=True)
class LayerMaps:
    """One layer's φ and ψ.

    Parameters
    ----------
    kind
        ``"paper"`` or ``"exp"``.
    tensors
        By name, shaped as `tensor_shapes` says.
    """

    kind: str
    tensors: Mapping[str, Tensor]

    @property
    def hidden(self) -> int:
        """Hidden size of both maps."""
        return self.tensors["phi_w1"].shape[2]

    @property
    def rank(self) -> int:
        """R, how many features they give."""
        return self.tensors["phi_w2"].shape[2]

    @property
    def shapes(self) -> dict[str, int]:
        """The sizes that must agree with a config's."""
        query_heads, head_dim, hidden = self.tensors["phi_w1"].shape
        return {
            "query_heads": query_heads,
            "kv_heads": self.tensors["psi_w1"].shape[0],
            "head_dim": head_dim,
            "hidden": hidden,
            "rank": self.rank,
        }

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> LayerMaps:
        """The maps on another device; `dtype` is that of the first layers' matrices.

        What acts on the R features stays float32, or float64 where `dtype` is.
        """
        last = torch.float64 if dtype == torch.float64 else torch.float32
        return LayerMaps(
            self.kind,
            {
                name: tensor.to(
                    device=device,
                    dtype=None if dtype is None else (dtype if name in FIRST_LAYERS else last),
                )
                for name, tensor in self.tensors.items()
            },
        )

    def heads(self, query_heads: slice, kv_heads: slice) -> LayerMaps:
        """The maps of some heads alone."""
        return LayerMaps(
            self.kind,
            {
                name: tensor[query_heads if name.startswith("phi") else kv_heads]
                for name, tensor in self.tensors.items()
            },
        )

    def phi(self, queries: Tensor) -> Tensor:
        """Features of queries, at least 0, in float32 (float64 for float64 maps).

        Parameters
        ----------
        queries
            [B, Hq, S, D], after the rotary embedding.

        Returns
        -------
        Tensor
            [B, Hq, S, R].
        """
        t = self.tensors
        return self.finish_phi(self.two_layers(queries, t["phi_w1"], t["phi_w2"]))

    def finish_phi(self, features: Tensor) -> Tensor:
        """What follows the second layer of φ. [B, Hq, S, R]."""
        if self.kind == "exp":
            return features.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
        return F.gelu(features).abs()

    def psi(self, keys: Tensor) -> Tensor:
        """Features of keys, at least 0, in float32 (float64 for float64 maps).

        Parameters
        ----------
        keys
            [B, Hkv, S, D], after the rotary embedding.

        Returns
        -------
        Tensor
            [B, Hkv, S, R].
        """
        t = self.tensors
        first = t.get("psi_b1")
        return self.finish_psi(self.two_layers(keys, t["psi_w1"], t["psi_w2"], first))

    def finish_psi(self, features: Tensor) -> Tensor:
        """What follows the second layer of ψ. [B, Hkv, S, R]."""
        t = self.tensors
        if self.kind == "exp":
            exponent = features + t["psi_b"].unsqueeze(1)
            return exponent.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
        u = t["psi_s1"].abs().unsqueeze(1) * F.gelu(features)
        return (u + (u @ t["psi_w3"]) * t["psi_s2"].unsqueeze(1)).abs()

    def both(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """φ(queries) [B, Hq, S, R] and ψ(keys) [B, Hkv, S, R]."""
        return self.phi(queries), self.psi(keys)

    def activate(self, hidden: Tensor) -> Tensor:
        """What follows the first layer of both maps."""
        return F.gelu(hidden)

    def two_layers(self, x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None) -> Tensor:
        """gelu(x w1 + bias) w2 by head, the sum of the last product in float32 or wider."""
        batch, heads, length, head_dim = x.shape
        # One product per head for the whole batch: the weights are read once, not once a sequence.
        rows = x.to(w1.dtype).transpose(0, 1).reshape(heads, batch * length, head_dim)
        first = rows @ w1
        if bias is not None:
            first = first + bias.unsqueeze(1)
        features = self.activate(first) @ w2
        wide = torch.promote_types(features.dtype, torch.float32)
        return features.to(wide).view(heads, batch, length, -1).transpose(0, 1)


def untrained_layer(
    kind: str, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
) -> LayerMaps:
    """One layer's maps before training, as `FeatureMaps.initialise` describes them.

    Parameters
    ----------
    kind
        ``"paper"`` or ``"exp"``.
    shapes
        From `tensor_shapes`.
    generator
        Source of the random numbers, on the CPU.
    """
    constants = {"psi_s1": 1e-4, "psi_s2": 1e-4, "psi_b": -4.0}
    tensors = {}
    for name, shape in shapes.items():
        if name in constants:
            tensors[name] = torch.full(shape, constants[name])
        else:
            bound = math.sqrt(6 / (shape[-2] + shape[-1]))
            tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
    return LayerMaps(kind, tensors)


def checked_layer(index: int, tensors: Mapping[str, Any], kind: str | None) -> LayerMaps:
    """One layer's maps from arrays by name, as `FeatureMaps.from_tensors` describes them."""
    where = f"layers[{index}]"
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{where}: got {type(tensors).__name__}, expected a dict of arrays")
    if kind is None:
        kind = "exp" if "psi_b" in tensors else "paper"
    wanted = (*FIRST_LAYERS, *LAST_LAYERS[kind])
    if set(tensors) != set(wanted):
        raise ValueError(
            f"{where}: got the parameters {sorted(tensors)}, "
            f"expected those of kind {kind!r}: {sorted(wanted)}"
        )
    read = {}
    for name in wanted:
        check_dense(f"{where}.{name}", tensors[name])
        try:
            tensor = torch.as_tensor(tensors[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{where}.{name}: got {type(tensors[name]).__name__}, expected an array of "
                f"floating-point numbers: {error}"
            ) from None
        if not tensor.is_floating_point():
            raise TypeError(f"{where}.{name}: got dtype {tensor.dtype}, expected floating point")
        if tensor.is_meta:
            raise ValueError(f"{where}.{name}: on device meta, which holds no numbers")
        read[name] = tensor
    for name in ("phi_w1", "psi_w1", "phi_w2"):
        if read[name].ndim != 3:
            raise ValueError(
                f"{where}.{name}: got shape {tuple(read[name].shape)}, expected 3 dimensions"
            )
    query_heads, head_dim, hidden = read["phi_w1"].shape
    shapes = tensor_shapes(
        kind,
        query_heads=query_heads,
        kv_heads=read["psi_w1"].shape[0],
        head_dim=head_dim,
        hidden=hidden,
        rank=read["phi_w2"].shape[2],
    )
    for name, shape in shapes.items():
        if tuple(read[name].shape) != shape:
            raise ValueError(
                f"{where}.{name}: got shape {tuple(read[name].shape)}, expected {shape}"
            )
        if not bool(torch.isfinite(read[name]).all()):
            raise ValueError(f"{where}.{name}: holds NaN or infinity, expected finite numbers")
    return LayerMaps(kind, read)
