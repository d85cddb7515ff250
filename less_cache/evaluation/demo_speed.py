"""What a prompt and a decode step of a whole model take with several caches, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ..integrations.transformers import attach
from .perplexity import Contestant

ROUNDS, STEPS = 3, 6
"""Turns of each cache, and the timed steps in one; a turn begins with a step that is not timed."""


@dataclass(frozen=True)
class Speed:
    """What one cache's model does in how much time.

    Parameters
    ----------
    prompt_seconds
        A prompt of one sequence.
    tokens_per_second
        Of all sequences of a batch together, behind that prompt.
    """

    prompt_seconds: float
    tokens_per_second: float


@torch.no_grad()
def measure_speed(
    model: Any, contestants: Sequence[Contestant], prompt: Tensor, *, batch: int
) -> list[Speed]:
    """Time each cache's prompt, and decode steps behind it with so many copies of the sequence.

    The caches take turns, so that a busy machine slows them alike. The full cache is transformers'
    own: a `StaticCache` of just the length needed, which does not copy itself as it grows.

    Parameters
    ----------
    model
        A transformers model that `attach` takes, on the CPU.
    contestants
        The caches.
    prompt
        [1, S] token ids.
    batch
        Sequences of a decode step.

    Returns
    -------
    list of Speed
        One a contestant: medians.
    """
    caches: list[Any] = []
    prompts: list[float] = []
    steps: list[list[float]] = []
    # Warms the model up, so that the first cache does not pay for it.
    model(prompt[:, :64], use_cache=False)
    for contestant in contestants:
        with _attached(model, contestant) as attachment:
            cache = DynamicCache() if attachment is None else attachment.new_cache()
            started = time.perf_counter()
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            prompts.append(time.perf_counter() - started)
        if attachment is None:
            cache = _static(model, cache, batch, ROUNDS * (1 + STEPS))
        else:
            cache.batch_repeat_interleave(batch)
        caches.append(cache)
        steps.append([])
    token = prompt[:, -1:].repeat(batch, 1)
    for _ in range(ROUNDS):
        for contestant, cache, taken in zip(contestants, caches, steps, strict=True):
            with _attached(model, contestant):
                for turn in range(1 + STEPS):
                    started = time.perf_counter()
                    model(token, past_key_values=cache, use_cache=True)
                    if turn:
                        taken.append(time.perf_counter() - started)
    return [
        Speed(seconds, batch / median(taken)) for seconds, taken in zip(prompts, steps, strict=True)
    ]


def _attached(model: Any, contestant: Contestant) -> Any:
    if contestant.config is None:
        return nullcontext()
    return attach(model, contestant.config, contestant.maps, transforms=contestant.transforms)


def _static(model: Any, filled: Any, batch: int, room: int) -> StaticCache:
    """A cache of copies of the one sequence in another, with room for more tokens."""
    length = filled.get_seq_length()
    cache = StaticCache(model.config, max_cache_len=length + room)
    for index, layer in enumerate(filled.layers):
        keys, values = (x.repeat_interleave(batch, 0) for x in (layer.keys, layer.values))
        cache.update(keys, values, index)
        # One layer is held twice at most.
        layer.keys = layer.values = None
    return cache
