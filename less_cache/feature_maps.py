"""The maps of all layers, with where they came from: made, read, saved and published."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, check_device, check_int, check_memory, check_path
from ._hub import Pretrained
from .config import CacheConfig, collapsed, kv_shard
from .layer_maps import LAST_LAYERS, LayerMaps, checked_layer, tensor_shapes, untrained_layer
from .maps_io import (
    CARD,
    WEIGHTS,
    by_layer,
    card_text,
    load_folder,
    load_official,
    named_tensors,
    public_name,
    read_card,
    save_folder,
)


class FeatureMaps(Pretrained):
    """The maps of all layers, with where they came from; ``None`` for a layer of rank 0.

    Make them with `from_tensors`, `initialise`, `from_pretrained` or `from_official`.
    """

    # A repository of format 1 has a card beside its weights.
    _FILES = (WEIGHTS, CARD)
    _MESSAGE = "Upload LESS feature maps"

    def __init__(
        self,
        layers: Sequence[LayerMaps | None],
        *,
        model_id: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        kinds = {i: layer.kind for i, layer in enumerate(layers) if layer is not None}
        if not kinds:
            raise ValueError("layers: got none, expected the maps of at least one layer")
        first = min(kinds)
        for i, kind in kinds.items():
            if kind != kinds[first]:
                raise ValueError(
                    f"layers[{i}]: kind {kind!r} differs from layers[{first}]'s {kinds[first]!r}"
                )
        self.layers = tuple(layers)
        self.model_id = model_id
        self.record = dict(record or {})

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerMaps | None:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerMaps | None]:
        return iter(self.layers)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"FeatureMaps(kind={self.kind!r}, num_layers={len(self)}, {sizes})"

    @property
    def kind(self) -> str:
        """``"paper"`` or ``"exp"``."""
        return self._first.kind

    @property
    def rank(self) -> int | tuple[int, ...]:
        """R as `CacheConfig` takes it: one for all layers, or one a layer, 0 where none are."""
        return collapsed(tuple(0 if layer is None else layer.rank for layer in self.layers))  # type: ignore[no-any-return]

    @property
    def sizes(self) -> dict[str, Any]:
        """`LayerMaps.shapes` of the first maps, with the `rank` of all layers."""
        return {**self._first.shapes, "rank": self.rank}

    @property
    def _first(self) -> LayerMaps:
        return next(layer for layer in self.layers if layer is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the kind and every parameter: two maps with one digest are the same."""
        digest = hashlib.sha256(self.kind.encode())
        for i, layer in enumerate(self.layers):
            if layer is None:
                digest.update(f"{i}: none".encode())
                continue
            for name in sorted(layer.tensors):
                tensor = layer.tensors[name].detach().to("cpu", torch.float64).contiguous()
                digest.update(f"{i}.{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_tensors(
        cls,
        layers: Sequence[Mapping[str, Any] | None],
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
            Tensors or arrays of floating-point numbers. ``None`` for a layer of rank 0.
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
        if isinstance(layers, (str, bytes)) or not isinstance(layers, Sequence):
            raise TypeError(
                f"layers: got {type(layers).__name__}, expected a list of one dict a layer"
            )
        return cls(
            [
                None if tensors is None else checked_layer(i, tensors, kind)
                for i, tensors in enumerate(layers)
            ],
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
            Gives the shapes; its rank must be above 0 in some layer.
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
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: got {type(generator).__name__}, expected a torch.Generator"
            )
        if not config.has_state:
            raise ValueError("config: rank is 0, expected a rank above 0 for feature maps")
        if hidden is not None:
            hidden = check_int("hidden", hidden, minimum=1)
        generator = generator or torch.Generator().manual_seed(0)
        width = hidden or config.hidden or 512
        shapes = [
            tensor_shapes(
                kind,
                query_heads=config.query_heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                hidden=width,
                rank=rank,
            )
            for rank in config.ranks
        ]
        held = [own if rank else None for own, rank in zip(shapes, config.ranks, strict=True)]
        numbers = sum(sum(map(math.prod, own.values())) for own in held if own is not None)
        check_memory("hidden, rank", f"{width}, {config.rank}", 4.0 * numbers, torch.device("cpu"))
        return cls([None if own is None else untrained_layer(kind, own, generator) for own in held])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> FeatureMaps:
        """The maps on another device, the first layers' matrices in `dtype`.

        Raises
        ------
        TypeError, ValueError
            If there is no such device, or `dtype` is none of floating-point numbers.
        """
        if device is not None:
            device = check_device("device", device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: got {dtype!r}, expected a floating-point dtype of torch")
        layers = [None if layer is None else layer.to(device, dtype) for layer in self.layers]
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
        layers: list[LayerMaps | None] = []
        for layer in self.layers:
            if layer is None:
                layers.append(None)
                continue
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
        ValueError, TypeError
            If the number of layers, or any size of any layer, differs, or a layer has maps that
            needs none, or lacks some.
        """
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
        if len(self) != config.num_layers:
            raise ValueError(
                f"maps: made for {len(self)} layers, expected num_layers = {config.num_layers}"
            )
        for i, (layer, rank) in enumerate(zip(self.layers, config.ranks, strict=True)):
            if (layer is None) != (rank == 0):
                found = "none" if layer is None else "some"
                raise ValueError(f"maps: layer {i} has {found}, but its rank is {rank}")
            for name, size in ({} if layer is None else layer.shapes).items():
                wanted = rank if name == "rank" else getattr(config, name)
                if wanted is not None and size != wanted:
                    raise ValueError(f"maps: layer {i} has {name} = {size}, expected {wanted}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the maps into a folder: one safetensors file, with shapes, model and training.

        Whoever reads meanwhile, or after a crash, finds the old maps or the new ones.
        """
        save_folder(check_path("folder", folder), self._tensors(), self._card())

    def to_parts(self) -> tuple[dict[str, Tensor], str]:
        """What a file of something larger holds of them: tensors by name, and a card."""
        return named_tensors(self._tensors()), card_text(self._card())

    @classmethod
    def from_parts(cls, where: str, tensors: Mapping[str, Tensor], card: str) -> FeatureMaps:
        """The maps that `to_parts` took apart; `where` begins the messages of errors.

        Raises
        ------
        ValueError
            If tensors and card disagree.
        """
        fields = read_card(where, card)
        return cls._checked(where, by_layer(where, tensors, fields), fields)

    @classmethod
    def _read(cls, folder: Path) -> FeatureMaps:
        return cls._checked(str(folder), *load_folder(folder))

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
        return cls.from_tensors(
            load_official(check_path("folder", folder)), kind="paper", record=record
        )

    @classmethod
    def _checked(
        cls, where: str, layers: Sequence[Mapping[str, Tensor] | None], card: Mapping[str, Any]
    ) -> FeatureMaps:
        maps = cls.from_tensors(
            layers, kind=card["kind"], model_id=card["model_id"], record=card["training"]
        )
        for size, found in maps._card_sizes().items():
            if card.get(size) != found:
                raise ValueError(
                    f"{where}: says {size} = {card.get(size)}, but the maps have {found}"
                )
        return maps

    def _card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num_layers": len(self),
            **self._card_sizes(),
            "model_id": public_name(self.model_id),
            "training": self.record,
        }

    def _card_sizes(self) -> dict[str, Any]:
        """`sizes` as JSON has them."""
        rank = self.rank
        return {**self.sizes, "rank": rank if isinstance(rank, int) else [*rank]}

    def _tensors(self) -> list[Mapping[str, Tensor]]:
        return [{} if layer is None else layer.tensors for layer in self.layers]
