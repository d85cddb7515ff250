"""φ and ψ: the small trained maps through which evicted pairs are remembered.

Two kinds, of equal cost and state. ``"paper"`` is LESS's own (arXiv 2402.09398, section 3.2)::

    φ(q) = | gelu(gelu(q W1) W2) |
    ψ(k) = | u + (u W3) * s2 |,    u = |s1| * gelu(gelu(k V1) V2)

and ``"exp"`` fits a trained model better::

    φ(q) = exp(clamp(gelu(q W1) W2, ±30))
    ψ(k) = exp(clamp(gelu(k V1) V2 + b, ±30))
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._checks import check_choice, check_int
from .config import CacheConfig, kv_shard
from .maps_io import load_folder, load_official, locate, save_folder, upload

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


class FeatureMaps:
    """The maps of all layers, with where they came from.

    Make them with `from_tensors`, `initialise`, `from_pretrained` or `from_official`.
    """

    def __init__(
        self,
        layers: Sequence[LayerMaps],
        *,
        model_id: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if not layers:
            raise ValueError("layers: got none, expected the maps of at least one layer")
        for i, layer in enumerate(layers):
            if layer.kind != layers[0].kind:
                raise ValueError(
                    f"layers[{i}]: kind {layer.kind!r} differs from layers[0]'s {layers[0].kind!r}"
                )
        self.layers = tuple(layers)
        self.model_id = model_id
        self.record = dict(record or {})

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerMaps:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerMaps]:
        return iter(self.layers)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.layers[0].shapes.items())
        return f"FeatureMaps(kind={self.kind!r}, num_layers={len(self)}, {sizes})"

    @property
    def kind(self) -> str:
        """``"paper"`` or ``"exp"``."""
        return self.layers[0].kind

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the kind and every parameter: two maps with one digest are the same."""
        digest = hashlib.sha256(self.kind.encode())
        for i, layer in enumerate(self.layers):
            for name in sorted(layer.tensors):
                tensor = layer.tensors[name].detach().to("cpu", torch.float64).contiguous()
                digest.update(f"{i}.{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_tensors(
        cls,
        layers: Sequence[Mapping[str, Any]],
        *,
        kind: str | None = None,
        model_id: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> FeatureMaps:
        """Maps from one dict of arrays a layer.

        Parameters
        ----------
        layers
            For each layer ``phi_w1`` [Hq, D, hidden], ``phi_w2`` [Hq, hidden, R], ``psi_w1``
            [Hkv, D, hidden], ``psi_w2`` [Hkv, hidden, R], and for the paper's kind ``psi_w3``
            [Hkv, R, R], ``psi_s1`` and ``psi_s2`` [Hkv, R], for ``"exp"`` ``psi_b`` [Hkv, R].
            Tensors or arrays of floating-point numbers.
        kind
            Default: told by the names.
        model_id, record
            The model they were trained for and how, kept with them.

        Raises
        ------
        ValueError
            If a parameter is missing, unknown, of the wrong shape, or not finite.
        TypeError
            If one is no array of floating-point numbers.
        """
        if kind is not None:
            check_choice("kind", kind, LAST_LAYERS)
        return cls(
            [_checked_layer(i, tensors, kind) for i, tensors in enumerate(layers)],
            model_id=model_id,
            record=record,
        )

    @classmethod
    def initialise(
        cls,
        config: CacheConfig,
        *,
        kind: str = "exp",
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> FeatureMaps:
        """Untrained maps: uniform Glorot weights, and a ψ that starts close to nothing.

        Parameters
        ----------
        config
            Gives the shapes; its rank must be above 0.
        kind
            ``"paper"`` or ``"exp"``.
        hidden
            Default: the config's, or the paper's 512.
        generator
            Source of the random numbers, on the CPU. Default: one seeded with 0.

        Raises
        ------
        ValueError, TypeError
            If the rank is 0, the kind unknown, or `hidden` no positive integer.
        """
        if config.rank == 0:
            raise ValueError("config: rank is 0, expected a rank above 0 for feature maps")
        if hidden is not None:
            hidden = check_int("hidden", hidden, minimum=1)
        generator = generator or torch.Generator().manual_seed(0)
        shapes = tensor_shapes(
            kind,
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden=hidden or config.hidden or 512,
            rank=config.rank,
        )
        return cls([untrained_layer(kind, shapes, generator) for _ in range(config.num_layers)])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> FeatureMaps:
        """The maps on another device, the first layers' matrices in `dtype`."""
        layers = [layer.to(device, dtype) for layer in self.layers]
        return FeatureMaps(layers, model_id=self.model_id, record=self.record)

    def shard(self, rank: int, world: int) -> FeatureMaps:
        """The maps of the heads that one of `world` tensor-parallel processes holds.

        Parameters
        ----------
        rank, world
            As of `CacheConfig.shard`, whose part of the cache these serve.

        Raises
        ------
        ValueError
            If the heads cannot be dealt out evenly.
        """
        layers = []
        for layer in self.layers:
            shapes = layer.shapes
            kv_heads = kv_shard(shapes["query_heads"], shapes["kv_heads"], rank, world)
            share = shapes["query_heads"] // world
            query_heads = slice(rank * share, (rank + 1) * share)
            layers.append(layer.heads(query_heads, kv_heads))
        return FeatureMaps(layers, model_id=self.model_id, record=self.record)

    def check_against(self, config: CacheConfig) -> None:
        """Refuse maps that do not fit `config`.

        Raises
        ------
        ValueError
            If the number of layers, or any size of any layer, differs.
        """
        if len(self) != config.num_layers:
            raise ValueError(
                f"maps: made for {len(self)} layers, expected num_layers = {config.num_layers}"
            )
        for i, layer in enumerate(self.layers):
            for name, size in layer.shapes.items():
                wanted = getattr(config, name)
                if wanted is not None and size != wanted:
                    raise ValueError(f"maps: layer {i} has {name} = {size}, expected {wanted}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the maps into a folder: one safetensors file, with shapes, model and training.

        Whoever reads meanwhile, or after a crash, finds the old maps or the new ones.
        """
        save_folder(Path(folder), [layer.tensors for layer in self.layers], self._card())

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, subfolder: str = "", revision: str | None = None
    ) -> FeatureMaps:
        """Read maps from a folder, or from a repository of the Hugging Face hub.

        Parameters
        ----------
        name
            A folder's path; where there is none of that name, a hub repository's id.
        subfolder
            A folder inside it.
        revision
            Branch, tag or commit on the hub.

        Raises
        ------
        FileNotFoundError
            If there is neither.
        ValueError
            If a file is damaged, or tensors and description disagree.
        """
        folder = locate(name, subfolder, revision)
        layers, card = load_folder(folder)
        maps = cls.from_tensors(
            layers, kind=card["kind"], model_id=card["model_id"], record=card["training"]
        )
        for size, found in maps[0].shapes.items():
            if card.get(size) != found:
                raise ValueError(
                    f"{folder}: says {size} = {card.get(size)}, but the maps have {found}"
                )
        return maps

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the maps to a repository of the Hugging Face hub, made if need be.

        Returns
        -------
        str
            The address of the commit.
        """
        tensors = [layer.tensors for layer in self.layers]
        return upload(tensors, self._card(), repo_id, private=private, token=token)

    @classmethod
    def from_official(cls, folder: str | Path) -> FeatureMaps:
        """Read ``layer_0.pth``, ``layer_1.pth``, ... as the official LESS training writes them.

        Both of its models are understood: Llama (maps for each head) and Falcon (one ψ). Only
        tensors and plain numbers are read from the files; no code in them can run.

        Raises
        ------
        FileNotFoundError
            If the folder has no ``layer_0.pth``, or the numbering has a gap.
        ValueError
            If a file is damaged or not such a checkpoint.
        """
        record = {"source": "official LESS checkpoint"}
        return cls.from_tensors(load_official(Path(folder)), kind="paper", record=record)

    def _card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num_layers": len(self),
            **self[0].shapes,
            "model_id": public_name(self.model_id),
            "training": self.record,
        }


def public_name(model_id: str | None) -> str | None:
    """A model's name as it may be published: of an absolute path its last part alone."""
    if model_id is None:
        return None
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(model_id).is_absolute():
            return kind(model_id).name
    return model_id


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


def _checked_layer(index: int, tensors: Mapping[str, Any], kind: str | None) -> LayerMaps:
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
        tensor = torch.as_tensor(tensors[name])
        if not tensor.is_floating_point():
            raise TypeError(f"{where}.{name}: got dtype {tensor.dtype}, expected floating point")
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
