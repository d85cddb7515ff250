"""How much text and how many steps a tuning takes, and what that comes to in time."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_real
from .refining import LOOKED_AT

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TRIALS = 80
"""Passes from one layer on that measuring a layer takes, about."""
SHARE_OF_PASS = 0.55
"""Of a whole forward pass: layers before the measured one are not run again."""
JUDGED = 24
"""Caches that are judged on the validation text, each beside the full one."""
BACKWARD = 6
"""Forward passes that a sequence in a distilling step takes."""


@dataclass(frozen=True)
class Effort:
    """Sequences of text for each part of the work, and steps of distillation.

    Parameters
    ----------
    calibration
        For the bases of codes.
    measuring
        On which every head is measured; and as many others, on which whole caches are.
    fitting
        To which feature maps are fitted, layer by layer.
    validation
        On which whole caches are judged; never used for anything else.
    rounds
        Of measuring whole caches, to put heads' losses right; 0: none.
    steps, batch
        Of distillation, and sequences a step, from all of the text but validation's; 0 steps: none.
    """

    calibration: int = 24
    measuring: int = 8
    fitting: int = 64
    validation: int = 16
    rounds: int = 2
    steps: int = 100
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("calibration", "measuring", "fitting", "validation", "batch"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("rounds", self.rounds, minimum=0)
        check_int("steps", self.steps, minimum=0)

    def scaled(self, factor: float) -> Effort:
        """More or less of everything but the batch and the rounds."""
        names = ("calibration", "measuring", "fitting", "validation", "steps")
        changed = {name: max(2, round(getattr(self, name) * factor)) for name in names}
        return dataclasses.replace(self, **changed)

    def seconds(self, layers: int, seconds_per_pass: float) -> float:
        """What it comes to, about.

        Parameters
        ----------
        layers
            Of the model.
        seconds_per_pass
            Of one sequence through the model.
        """
        measuring = layers * TRIALS * SHARE_OF_PASS * self.measuring
        refining = self.rounds * (LOOKED_AT + layers) * 2 * self.measuring
        fitting = layers * 3 * self.fitting
        judging = JUDGED * 2 * self.validation
        distilling = self.steps * self.batch * BACKWARD
        return seconds_per_pass * (
            4 * self.calibration + measuring + refining + fitting + judging + distilling
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def without_distillation(self) -> dict[str, Any]:
        """The same but for its steps and batch."""
        return {n: x for n, x in self.to_dict().items() if n not in ("steps", "batch")}


@torch.no_grad()
def seconds_per_pass(model: Any, tokens: Tensor, device: str | None = None) -> float:
    """Seconds that one sequence takes through the model, on `device`: the better of two."""
    if device is not None:
        model = model.to(device)
    found = []
    for _ in range(2):
        started = time.perf_counter()
        model(tokens[:1].to(model.device), use_cache=False).logits.float().sum().item()
        found.append(time.perf_counter() - started)
    return min(found)


def effort_within(minutes: float, layers: int, seconds_per_pass: float) -> Effort:
    """The most that fits into so many minutes; the least there is where nothing fits."""
    check_real("minutes", minutes, above=0.0)
    fitting = [
        effort
        for effort in map(Effort().scaled, FACTORS)
        if effort.seconds(layers, seconds_per_pass) <= 60 * minutes
    ]
    return fitting[-1] if fitting else Effort().scaled(FACTORS[0])


def split(tokens: Tensor, effort: Effort) -> dict[str, Tensor]:
    """The text of each part of the work, spread over the whole; validation is the end of it.

    Parameters
    ----------
    tokens
        [n, N] token ids.
    effort
        How many sequences each part wants; it gets fewer where there are no more.

    Raises
    ------
    ValueError
        If there are not even eight sequences.
    """
    count = len(tokens)
    if count < 8:
        raise ValueError(f"tokens: got {count} sequences, expected at least 8")
    validation = min(effort.validation, max(2, count // 4))
    rest = tokens[: count - validation]

    def spread(wanted: int, shift: float) -> Tensor:
        wanted = min(wanted, len(rest))
        places = (torch.arange(wanted) + shift) * (len(rest) / wanted)
        return rest[places.long()]

    return {
        "calibration": spread(effort.calibration, 0.25),
        "measuring": spread(effort.measuring, 0.75),
        "refining": spread(effort.measuring, 0.0),
        "fitting": spread(effort.fitting, 0.5),
        "distilling": rest,
        "validation": tokens[count - validation :],
    }
