"""What each KV head of a layer loses, all else being full: by policy and slots, by codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int
from ..config import CacheConfig
from ..policies import Policy, policy_from_dict
from ..quantization import Quantization
from ..teacher_forced import attend_all, eviction_times, stored_pairs
from .bases import LayerBases
from .replay import LayerText, Replay

TOLERANCE = 1e-4
"""Nats a token: heads that lose less together are not told apart, nor tried with more slots."""


Profile = tuple[int, ...]
"""Bits of each eighth of the channels, as `Quantization.key_bits` takes them."""


@dataclass(frozen=True)
class LayerLosses:
    """What a layer's KV heads lose, in nats a token: the divergence of the predictions.

    Parameters
    ----------
    evicting
        Of each policy, for each head: slots -> loss, pairs stored as they are.
    keys, values
        Bits of keys, or of values -> what all heads together lose with all pairs in slots.
    """

    evicting: dict[Policy, list[dict[int, float]]]
    keys: dict[Profile, float]
    values: dict[Profile, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {
            "evicting": [
                {"policy": policy.to_dict(), "heads": [[*c.items()] for c in curves]}
                for policy, curves in self.evicting.items()
            ],
            "keys": [[list(bits), loss] for bits, loss in self.keys.items()],
            "values": [[list(bits), loss] for bits, loss in self.values.items()],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerLosses:
        """What `to_dict` made."""
        return cls(
            {
                policy_from_dict(entry["policy"]): [
                    {int(slots): loss for slots, loss in curve} for curve in entry["heads"]
                ]
                for entry in data["evicting"]
            },
            {tuple(bits): loss for bits, loss in data["keys"]},
            {tuple(bits): loss for bits, loss in data["values"]},
        )


@torch.no_grad()
def measure_layer(
    replay: Replay,
    index: int,
    policies: Sequence[Policy],
    slots: Sequence[int],
    bases: LayerBases | None = None,
) -> LayerLosses:
    """Measure every head of a layer.

    Parameters
    ----------
    replay
        The model on the text.
    index
        Which full-attention layer, from 0.
    policies
        What to try.
    slots
        What to try them with; fewer than the text's length. What a policy has no room for is left
        out.
    bases
        What the layer's bases of codes are fitted from; ``None``: codes are not measured.
    """
    text = replay.layer(index)
    length = text.k.shape[2]
    for tried in slots:
        check_int("slots", tried, minimum=1, maximum=length - 1)
    keys: dict[Profile, float] = {}
    values: dict[Profile, float] = {}
    if bases is not None:
        for key_bits, value_bits in bases.profiles():
            stored = _coded(replay, index, text, bases, key_bits, value_bits)
            for found, bits, pair in (
                (keys, key_bits, (stored[0], text.v)),
                (values, value_bits, (text.k, stored[1])),
            ):
                if bits not in found:
                    spec = replay.config.layer(index)
                    out = attend_all(spec, None, text.q, text.k, text.v, never(text), stored=pair)
                    found[bits] = replay.distance(text, out)
    evicting = {}
    for policy in policies:
        curves: list[dict[int, float]] = [{length: 0.0} for _ in range(text.k.shape[1])]
        open_heads = list(range(len(curves)))
        for tried in sorted(slots):
            config = with_slots(replay.config, policy, tried)
            if config is None or not open_heads:
                continue
            spec = config.layer(index)
            times = eviction_times(spec, text.q, text.k)
            out = attend_all(spec, None, text.q, text.k, text.v, times)
            losses = by_head(replay, text, out, open_heads)
            for head, loss in zip(open_heads, losses, strict=True):
                curves[head][tried] = loss
            open_heads = [
                head
                for head, loss in zip(open_heads, losses, strict=True)
                if loss > TOLERANCE / len(curves)
            ]
        evicting[policy] = curves
    return LayerLosses(evicting, keys, values)


def _coded(
    replay: Replay,
    index: int,
    text: LayerText,
    bases: LayerBases,
    key_bits: Profile,
    value_bits: Profile,
) -> tuple[Tensor, Tensor]:
    """All pairs as slots of so many bits give them back."""
    quantization = Quantization(key_bits, value_bits, "calibrated")
    spec = replay.config.replace(quantization=quantization).layer(index)
    stored = stored_pairs(spec, text.k, text.v, bases.fitted(quantization))
    assert stored is not None
    return stored


def by_head(
    replay: Replay, text: LayerText, out: Tensor, heads: Sequence[int] | None = None
) -> list[float]:
    """The loss of each KV head whose outputs are taken from `out`, the others' being full.

    Heads are tried together first; only where they lose more than `TOLERANCE`, one by one.

    Parameters
    ----------
    replay, text
        The model, and the layer's text.
    out
        [n, Hq, N, D].
    heads
        Which. Default: all.
    """
    heads = range(text.k.shape[1]) if heads is None else heads
    together = _distance(replay, text, out, heads)
    if len(heads) == 1 or together <= TOLERANCE:
        return [together / len(heads)] * len(heads)
    return [_distance(replay, text, out, [head]) for head in heads]


def _distance(replay: Replay, text: LayerText, out: Tensor, heads: Sequence[int]) -> float:
    group = text.q.shape[1] // text.k.shape[1]
    mixed = text.out.clone()
    for head in heads:
        mixed[:, head * group : (head + 1) * group] = out[:, head * group : (head + 1) * group]
    return replay.distance(text, mixed)


def with_slots(config: CacheConfig, policy: Policy, slots: int) -> CacheConfig | None:
    """That many slots for every head; ``None`` where they are too few for the policy."""
    try:
        return config.replace(capacity=slots, policy=policy, rank=0, quantization=None)
    except ValueError:
        return None


def never(text: LayerText) -> Tensor:
    """Eviction times of pairs that all stay."""
    length = text.k.shape[2]
    return torch.full(text.k.shape[:3], length, dtype=torch.int32, device=text.k.device)
