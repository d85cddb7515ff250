"""What a low-rank state saves in a layer: maps fitted quickly, and the layer measured with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layer_maps import LayerMaps
from ..policies import Policy
from ..teacher_forced import attend_all, eviction_times
from ..training.collect import collect_layer
from ..training.layer import fit_layer
from ..training.recipe import Recipe
from ..training.runs import load_checkpoint, save_checkpoint
from .measuring import TOLERANCE, by_head
from .replay import Replay

QUICK = Recipe(
    kind="exp",
    hidden=128,
    epochs=6,
    batch=4,
    rows=96,
    learning_rate=3e-3,
    schedule="cosine",
    dropout=0.0,
)
FITTED_AT = 16
"""Slots a head for which the quick maps are fitted: a state is for heads that have few."""


def quick_maps(
    replay: Replay,
    tokens: Tensor,
    index: int,
    policy: Policy,
    rank: int,
    folder: Path,
    *,
    progress: bool,
) -> LayerMaps:
    """Maps of one layer for measuring; read from `folder` where they are there.

    Parameters
    ----------
    replay
        The model.
    tokens
        [n, N] token ids to fit to.
    index
        Which full-attention layer, from 0.
    policy, rank
        The layer's.
    folder
        Of this layer's fit.
    progress
        Show bars.
    """
    path = folder / "maps.safetensors"
    found = load_checkpoint(path)
    if found is not None:
        return LayerMaps(QUICK.kind, found[0])
    slots = FITTED_AT
    config = replay.config.replace(
        capacity=slots, policy=policy, rank=rank, hidden=None, quantization=None
    )
    spec = config.layer(index)
    data = collect_layer(replay.model, tokens, index, spec, progress=progress)
    maps = fit_layer(spec, data, QUICK, folder, index, progress=progress)
    save_checkpoint(path, maps.tensors, {"kind": maps.kind})
    return maps


@torch.no_grad()
def measure_state(
    replay: Replay,
    index: int,
    policy: Policy,
    maps: LayerMaps,
    slots: Sequence[int],
) -> list[dict[int, float]]:
    """What each head loses with so many slots and the layer's state, in nats a token.

    Parameters
    ----------
    replay
        The model on the text.
    index
        Which full-attention layer, from 0.
    policy
        The layer's.
    maps
        φ and ψ of the layer.
    slots
        What to try.

    Returns
    -------
    list
        For each KV head: slots -> loss.
    """
    text = replay.layer(index)
    maps = maps.to(text.q.device, torch.float32)
    curves: list[dict[int, float]] = [{} for _ in range(text.k.shape[1])]
    for tried in slots:
        config: Any = replay.config.replace(
            capacity=tried, policy=policy, rank=maps.shapes["rank"], quantization=None
        )
        spec = config.layer(index)
        times = eviction_times(spec, text.q, text.k)
        out = attend_all(spec, maps, text.q, text.k, text.v, times)
        for curve, loss in zip(curves, by_head(replay, text, out), strict=True):
            curve[tried] = loss
        if all(curve[tried] <= TOLERANCE / len(curves) for curve in curves):
            break
    return curves
