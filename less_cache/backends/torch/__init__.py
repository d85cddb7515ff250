"""The fast PyTorch backend, for CPU and GPU.

Static shapes, the arrays updated in place. A decode step (S = 1) never waits for a GPU, and takes
all heads of a layer together, whatever their capacities; several tokens at once go through `chunk`,
a run of heads of equal capacity after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...arrays import LayerArrays
from ...config import CacheConfig
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ...policies import Gain
from .. import following
from . import chunk, scan, step
from .maps import JoinedMaps, join
from .pairs import AttendPairs, attend_pairs
from .slots import open_layer, open_run

__all__ = ["attend", "check_config", "eviction_times", "prepare_maps"]


def check_config(config: CacheConfig) -> None:
    """Refuse policies whose scores one head of one sequence at a time must compute.

    Raises
    ------
    ValueError
        If a layer's policy is a user's own, and not vectorised.
    """
    for i, policy in enumerate(config.policies):
        if policy.custom and not policy.vectorised:
            raise ValueError(
                f"policy: layer {i} has {policy}, which works on one head of one sequence at a "
                "time, as only backend 'reference' does; write initial_scores() and update() for "
                "any number of axes in front, and say vectorised = True"
            )


def prepare_maps(maps: LayerMaps, layer: LayerConfig, device: Any) -> Prepared:
    """The maps on the arrays' device, in the dtype of computing."""
    whole = join(maps.to(device, getattr(torch, layer.score_dtype)))
    if len(layer.runs) == 1:
        return Prepared(whole, (whole,))
    runs = [whole.heads(run.query_heads, run.kv_heads) for run in layer.runs]
    return Prepared(whole, tuple(map(join, runs) if _by_run(layer) else runs))


@dataclass(frozen=True)
class Prepared:
    """One layer's maps.

    Parameters
    ----------
    whole
        Of all heads.
    runs
        Of each run of heads; joined, where steps take one after another.
    """

    whole: JoinedMaps
    runs: tuple[LayerMaps, ...]


def _by_run(layer: LayerConfig) -> bool:
    """Whether a step, too, takes a run of equal heads after another."""
    # What such policies do with a score depends on the pairs of its head.
    return len(layer.runs) == 1 or layer.policy.gains in (Gain.HISTORY, Gain.GIVEN)


def attend(
    layer: LayerConfig,
    arrays: LayerArrays,
    maps: Prepared | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    rows: Tensor | None = None,
    mask: Tensor | None = None,
    clean: bool = False,
    shift: Tensor | None = None,
    pairs: AttendPairs = attend_pairs,
) -> Tensor:
    """The step; see `Backend.attend`. `pairs` attends over the slots where one token is new."""
    one = k.shape[2] == 1
    with torch.no_grad():
        if rows is not None:
            rows = rows.long()
        if one and not _by_run(layer):
            held = open_layer(layer, arrays, rows, None if clean else lengths)
            whole = None if maps is None else maps.whole
            out = step.attend(layer, held, whole, q, k, v, lengths, mask, shift, pairs=pairs)
            held.close()
            return out
        outs = []
        for index, run in enumerate(layer.runs):
            held = open_run(run, arrays, rows, None if clean else lengths)
            heads = (q[:, run.query_heads], k[:, run.kv_heads], v[:, run.kv_heads])
            own: Any = None if maps is None else maps.runs[index]
            added = None if shift is None else shift[:, run.query_heads]
            given = (run.layer, held, own, *heads, lengths, mask, added)
            outs.append(step.attend(*given, pairs=pairs) if one else chunk.attend(*given))
            held.close()
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def eviction_times(
    layer: LayerConfig, q: Tensor, k: Tensor, mask: Tensor | None, *, prompt: int
) -> Tensor:
    """When each pair leaves; see `Backend.eviction_times`."""
    if prompt > 1 or layer.policy.custom:
        return following.eviction_times(attend, layer, q, k, mask, prompt=prompt)
    return scan.eviction_times(layer, q, k, mask)
