"""`append` as a functional `torch.library` operator: what ``torch.export`` sees of a cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import torch_backend
from .config import LayerConfig
from .feature_maps import FIRST_LAYERS, LAST_LAYERS, LayerMaps
from .policies import policy_from_dict
from .state import LayerState


def state_names(layer: LayerConfig) -> tuple[str, ...]:
    """The arrays that `layer`'s state consists of, `length` aside: those that hold anything.

    Without a low-rank state there is no H and no z; a history only where the policy keeps one.
    """
    names = ["keys", "values", "scores", "positions"]
    if layer.policy.history_window:
        names.append("history")
    if layer.rank:
        names += ["H", "z"]
    return tuple(names)


def map_names(kind: str | None) -> tuple[str, ...]:
    """The feature maps' parameters, in the order in which the operator takes them."""
    return () if kind is None else (*FIRST_LAYERS, *LAST_LAYERS[kind])


def layer_spec(layer: LayerConfig, kind: str | None) -> str:
    """`layer` and its maps' kind as one string, which an operator may take and a graph may hold."""
    fields = {
        name: getattr(layer, name) for name in LayerConfig.__dataclass_fields__ if name != "policy"
    }
    return json.dumps({**fields, "policy": layer.policy.to_dict(), "kind": kind}, sort_keys=True)


@functools.cache
def read_spec(spec: str) -> tuple[LayerConfig, str | None]:
    """What `layer_spec` wrote."""
    fields: dict[str, Any] = json.loads(spec)
    kind = fields.pop("kind")
    fields["policy"] = policy_from_dict(fields["policy"])
    return LayerConfig(**fields), kind


def make_state(layer: LayerConfig, length: Tensor, arrays: Sequence[Tensor]) -> LayerState:
    """A `LayerState` of copies: H and z of no rows where the layer has none."""
    names = state_names(layer)
    held: dict[str, Any] = {n: x.clone() for n, x in zip(names, arrays, strict=True)}
    if not layer.rank:
        wide = getattr(torch, layer.state_dtype)
        heads = held["scores"].shape[:2]
        held["H"] = held["keys"].new_zeros((*heads, 0, layer.head_dim), dtype=wide)
        held["z"] = held["keys"].new_zeros((*heads, 0), dtype=wide)
    return LayerState(**held, length=length.clone())


def make_maps(kind: str | None, tensors: Sequence[Tensor], dtype: torch.dtype) -> LayerMaps | None:
    """The maps with their matrices in `dtype`; ``None`` without a kind."""
    if kind is None:
        return None
    maps = LayerMaps(kind, dict(zip(map_names(kind), tensors, strict=True)))
    return maps.to(dtype=dtype)


@torch.library.custom_op("less_cache::append", mutates_args=())
def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    length: Tensor,
    state: list[Tensor],
    maps: list[Tensor],
    spec: str,
) -> list[Tensor]:
    """`CacheManager.append` of one layer, without side effects.

    Parameters
    ----------
    q
        [B, Hq, S, D].
    k, v
        [B, Hkv, S, D].
    mask
        [B, S] int32, 0 at padding.
    length
        [B] int32, tokens seen before.
    state
        The arrays that `state_names` names, in that order.
    maps
        The parameters that `map_names` names, in that order.
    spec
        From `layer_spec`.

    Returns
    -------
    list of Tensor
        The output [B, Hq, S, D], then the new state in the same order.
    """
    layer, kind = read_spec(spec)
    held = make_state(layer, length, state)
    prepared = make_maps(kind, maps, held.scores.dtype)
    out = torch_backend.append(layer, held, prepared, q, k, v, mask != 0)
    return [out, *(getattr(held, name) for name in state_names(layer))]


@append.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    length: Tensor,
    state: list[Tensor],
    maps: list[Tensor],
    spec: str,
) -> list[Tensor]:
    return [torch.empty_like(q), *(torch.empty_like(array) for array in state)]
