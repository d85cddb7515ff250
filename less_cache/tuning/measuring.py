"""What each KV head loses with how many slots, all others keeping everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from .._checks import check_int
from ..config import CacheConfig
from ..evaluation.perplexity import Contestant, Window, score
from ..quantization.transforms import Transforms


@dataclass(frozen=True)
class HeadLosses:
    """Losses by head.

    Parameters
    ----------
    curves
        For each layer, for each KV head: slots -> nats a token more than with all slots.
    full
        Nats a token with all slots, pairs stored as the config says.
    """

    curves: list[list[dict[int, float]]]
    full: float


def measure_heads(
    model: Any,
    windows: Sequence[Window],
    config: CacheConfig,
    slots: Sequence[int],
    *,
    transforms: Transforms | None = None,
    batch: int = 4,
    progress: bool = True,
) -> HeadLosses:
    """Measure every head at several capacities, one head at a time, on some text.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    windows
        All of one length.
    config
        Policy and bits; its capacities do not matter. Its rank must be 0.
    slots
        What to try; fewer than a window's length.
    transforms
        The bases of codes, where they are calibrated.
    batch
        Windows a forward pass.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        If the rank is not 0, windows differ in length, or `slots` are none that can be tried.
    """
    if config.has_state:
        raise ValueError(f"config: rank is {config.rank}, expected 0: slots alone are measured")
    lengths = {len(window.ids) for window in windows}
    if len(lengths) != 1:
        raise ValueError(f"windows: of lengths {sorted(lengths)}, expected one length")
    (length,) = lengths
    if not slots:
        raise ValueError("slots: got none to try")
    for tried in slots:
        check_int("slots", tried, minimum=2, maximum=length - 1)
    heads = (config.num_layers, config.kv_heads)

    def mean_loss(capacities: list[list[int]]) -> float:
        contestant = Contestant("one", config.replace(capacity=capacities), None, transforms)
        found = score(model, windows, contestant, batch=batch, progress=False)
        nats, tokens = found.by_document()
        return float(nats.sum() / tokens.sum())

    full = mean_loss([[length] * heads[1] for _ in range(heads[0])])
    curves: list[list[dict[int, float]]] = [
        [{length: 0.0} for _ in range(heads[1])] for _ in range(heads[0])
    ]
    bar = tqdm(total=heads[0] * heads[1] * len(slots), desc="heads", disable=not progress)
    with bar:
        for layer in range(heads[0]):
            for head in range(heads[1]):
                for tried in slots:
                    capacities = [[length] * heads[1] for _ in range(heads[0])]
                    capacities[layer][head] = tried
                    curves[layer][head][tried] = mean_loss(capacities) - full
                    bar.update()
    return HeadLosses(curves, full)
