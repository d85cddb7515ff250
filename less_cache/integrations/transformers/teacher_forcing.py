"""A transformers model over whole sequences, with a small cache's exact decode semantics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...config import CacheConfig
from ...feature_maps import FeatureMaps
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ...quantization.transforms import LayerTransforms
from ...teacher_forced import attend_all, eviction_times, stored_pairs
from .interception import Enough, intercepted

Stored = Callable[[int, LayerConfig, Tensor, Tensor], tuple[Tensor, Tensor] | None]


def small_cache_logits(
    model: Any,
    config: CacheConfig,
    maps: FeatureMaps | Sequence[LayerMaps | None] | None,
    ids: Tensor,
    *,
    recompute: bool = True,
    transforms: Sequence[LayerTransforms | None] | None = None,
    times: Sequence[Tensor] | None = None,
    stored: Stored | None = None,
) -> Tensor:
    """The model's logits with a small cache, as if it had decoded token by token.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    config
        Capacity and policy.
    maps
        For each layer; ``None`` runs the policy alone.
    ids
        [B, N] token ids.
    recompute
        As of `teacher_forced.attend_all`.
    transforms
        The bases of codes, for each layer, where the config has calibrated ones.
    times
        For each layer [B, Hkv, N], when pairs leave; default: what the policy makes of these very
        queries and keys.
    stored
        What slots give back, of a layer's index and config, keys and values; default:
        `teacher_forced.stored_pairs`, through which no gradient flows.

    Returns
    -------
    Tensor
        [B, N, vocabulary]; gradients flow into the maps, and through `stored`.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = config.layer(layer)
        basis = None if transforms is None else transforms[layer]
        gone = (
            eviction_times(spec, q.detach(), k.detach(), transforms=basis)
            if times is None
            else times[layer]
        )
        used = None if maps is None else maps[layer]
        held = stored_pairs(spec, k, v, basis) if stored is None else stored(layer, spec, k, v)
        return attend_all(spec, used, q, k, v, gone, stored=held, recompute=recompute)

    with intercepted(model, attend):
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def times_under_full_cache(
    model: Any,
    config: CacheConfig,
    ids: Tensor,
    *,
    transforms: Sequence[LayerTransforms | None] | None = None,
) -> list[Tensor]:
    """When pairs would leave each layer, [B, Hkv, N], if all layers before had full caches.

    Parameters
    ----------
    model, config, ids, transforms
        As of `small_cache_logits`.
    """
    found: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = config.layer(layer)
        basis = None if transforms is None else transforms[layer]
        found.append(eviction_times(spec, q, k, transforms=basis))
        if len(found) == config.num_layers:
            raise Enough
        never = torch.full_like(found[-1], k.shape[2])
        return attend_all(spec, None, q, k, v, never)

    with torch.no_grad(), intercepted(model, attend), contextlib.suppress(Enough):
        model(ids, use_cache=False)
    return found
