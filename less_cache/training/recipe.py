"""How feature maps are fitted: numbers only."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import check_choice, check_int, check_real
from ..layer_maps import LAST_LAYERS

SCHEDULES = ("halving", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How one layer's maps are fitted. The defaults are the paper's.

    Parameters
    ----------
    kind
        Of the maps, see `feature_maps`.
    hidden
        Their hidden size.
    epochs
        Passes over the training sequences.
    batch
        Sequences a step.
    rows
        Query rows drawn from each batch; ``None``: all past the budget, as the paper does.
    learning_rate
        Adam's, at the start.
    schedule
        ``"halving"``: halved every `halve_every` epochs; ``"cosine"``: falls to zero at the end.
    halve_every
        Epochs.
    dropout
        Share of hidden activations dropped.
    validation
        Share of the sequences that are kept for validation, the last ones.
    patience
        Epochs without a better validation error after which a layer stops; ``None``: never.
    seed
        Of weights, order, rows and dropout.
    """

    kind: str = "paper"
    hidden: int = 512
    epochs: int = 40
    batch: int = 2
    rows: int | None = None
    learning_rate: float = 1e-3
    schedule: str = "halving"
    halve_every: int = 10
    dropout: float = 0.3
    validation: float = 0.1
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, LAST_LAYERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("hidden", "epochs", "batch", "halve_every"):
            check_int(name, getattr(self, name), minimum=1)
        for name in ("rows", "patience"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=1)
        check_int("seed", self.seed, minimum=0)
        check_real("learning_rate", self.learning_rate, above=0.0)
        if self.dropout != 0:
            check_real("dropout", self.dropout, above=0.0, maximum=0.9)
        check_real("validation", self.validation, above=0.0, maximum=0.5)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate at a step, counted from 0."""
        if self.schedule == "cosine":
            progress = step / (self.epochs * steps_per_epoch)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * 0.5 ** (step // steps_per_epoch // self.halve_every)

    def held_out(self, sequences: int) -> int:
        """How many of so many sequences are kept for validation."""
        return max(1, round(sequences * self.validation))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class DistillRecipe:
    """How the maps of all layers, and the bases of their codes, are fitted together.

    Parameters
    ----------
    steps
        Steps of Adam.
    batch
        Sequences a step.
    learning_rate
        At its peak; it rises over the first twentieth of the steps and falls to zero by a cosine.
    clip
        Largest norm of a step's gradient.
    validation
        Sequences that are kept for validation, the last ones.
    validate_every
        Steps.
    seed
        Of the order.
    micro_batch
        Sequences that go through the model together; more are faster and take more memory.
    recompute
        Make attention weights again in the backward pass instead of keeping them: more time, far
        less memory.
    full_evictions
        Evict as if all layers before had full caches: worked out once, where the policy's own
        steps for every sequence anew would take most of the time.
    bases
        Fit the calibrated bases of codes as well, through the codes.
    """

    steps: int = 400
    batch: int = 4
    learning_rate: float = 1e-3
    clip: float = 1.0
    validation: int = 8
    validate_every: int = 50
    seed: int = 0
    micro_batch: int = 1
    recompute: bool = True
    full_evictions: bool = False
    bases: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validation", "validate_every", "micro_batch"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("seed", self.seed, minimum=0)
        for name in ("learning_rate", "clip"):
            check_real(name, getattr(self, name), above=0.0)

    def rate(self, step: int) -> float:
        """The learning rate at a step, counted from 0."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


RECIPES = {
    "paper": Recipe(),
    "fast": Recipe(
        kind="exp",
        hidden=256,
        epochs=10,
        rows=96,
        learning_rate=3e-3,
        schedule="cosine",
        dropout=0.0,
    ),
}
"""By name: the paper's, and one that reaches a lower error in a fraction of the time."""


def generator(*key: Any) -> torch.Generator:
    """A generator seeded by a key, so that no draw depends on the draws before it.

    A run that was killed thus goes on exactly as it would have, without a stored generator.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
