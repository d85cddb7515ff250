"""Fitting one layer's φ and ψ by the error after the output projection."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .._checks import check_memory
from ..layer_config import LayerConfig
from ..layer_maps import LayerMaps, tensor_shapes, untrained_layer
from .collect import LayerData
from .recipe import Recipe, generator
from .runs import Log, best_of, restore_fit, save_fit

SAVE_EVERY_SECONDS = 60.0
VALIDATION_ROWS = 128
logger = logging.getLogger(__name__)
NUMBERS_A_PARAMETER = 5
"""Kept while a layer is fitted: itself, the best one, its gradient and Adam's two."""


@dataclass(frozen=True)
class DroppingMaps(LayerMaps):
    """Maps that drop a share of their hidden activations, as the paper does while training.

    Parameters
    ----------
    share
        Above 0, below 1.
    draws
        Source of the random numbers.
    """

    share: float
    draws: torch.Generator

    def activate(self, hidden: Tensor) -> Tensor:
        keep = torch.rand(hidden.shape, generator=self.draws) >= self.share
        return F.gelu(hidden * keep.to(hidden.device) / (1 - self.share))


def fit_layer(
    spec: LayerConfig,
    data: LayerData,
    recipe: Recipe,
    folder: Path,
    layer: int,
    *,
    progress: bool = True,
) -> LayerMaps:
    """Fit one layer's maps, or go on where a killed run stopped.

    The loss is the mean squared error of the layer's output, after its output projection, against
    the full cache's, over query rows past the budget; it is reported as a share of the error that
    the policy makes alone.

    Parameters
    ----------
    spec
        The layer's shapes, with the rank of the maps.
    data
        Of this layer; the last `recipe.validation` of its sequences are for validation.
    recipe
        The numbers.
    folder
        For the checkpoint and the log of this layer.
    layer
        Its number; seeds depend on it.
    progress
        Show a bar.

    Returns
    -------
    LayerMaps
        The maps of the epoch with the least validation error.

    Raises
    ------
    ValueError
        If the maps cannot be fitted (`check_can_fit`), or no epoch ends in a finite error.
    """
    check_can_fit(spec, data.k.shape[0], data.k.shape[2], recipe, layer)
    fit = _Fit(spec, data, recipe, layer)
    path = folder / "checkpoint.safetensors"
    step = fit.restore(path)
    if step:
        logger.info("layer %d: goes on after step %d", layer, step)
    log = Log(folder / "log.jsonl", step)
    total = recipe.epochs * fit.steps_per_epoch
    saved, diverged = time.monotonic(), False
    bar = tqdm(
        total=total, initial=step, desc=f"layer {layer}: fit", unit="step", disable=not progress
    )
    with bar:
        while step < total and not fit.finished and not diverged:
            loss = fit.step(step)
            step += 1
            bar.update()
            diverged = not math.isfinite(loss)
            if step % fit.steps_per_epoch == 0:
                error = fit.validate()
                log.write(
                    step=step, epoch=step // fit.steps_per_epoch, train=loss, validation=error
                )
                logger.info("layer %d, step %d: validation %.4f", layer, step, error)
                bar.set_postfix(error=f"{error:.3f}", best=f"{fit.best_error:.3f}")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                fit.save(path, step)
                saved = time.monotonic()
    fit.save(path, step)
    if not math.isfinite(fit.best_error):
        raise ValueError(
            f"learning_rate: got {recipe.learning_rate}, with which the fit of layer {layer} came "
            "to no finite error; take a smaller one"
        )
    if diverged:
        warnings.warn(
            f"layer {layer}: the fit diverged at step {step}; the maps of its best epoch are kept",
            stacklevel=2,
        )
    return LayerMaps(recipe.kind, fit.best)


def check_can_fit(
    spec: LayerConfig, sequences: int, tokens: int, recipe: Recipe, layer: int
) -> None:
    """Refuse what cannot be fitted before anything is computed or written.

    Parameters
    ----------
    spec
        The layer's shapes.
    sequences, tokens
        How much text there is: sequences of so many tokens each.
    recipe
        The numbers.
    layer
        Its number, for messages.

    Raises
    ------
    ValueError
        If there are too few sequences, nothing is evicted from them, or the maps are too large
        for this machine.
    """
    if not spec.policy.evicts:
        raise ValueError(f"policy: {spec.policy} evicts nothing, so there is nothing to fit")
    held = recipe.held_out(sequences)
    if sequences - held < recipe.batch:
        raise ValueError(
            f"tokens: got {sequences} sequences, expected at least {recipe.batch + held}"
        )
    if tokens <= min(spec.capacities):
        raise ValueError(
            f"tokens: sequences of {tokens} lose nothing to a capacity of {min(spec.capacities)}, "
            f"layer {layer}'s; expected longer ones"
        )
    shapes = _shapes(spec, recipe)
    needed = 4 * NUMBERS_A_PARAMETER * sum(math.prod(shape) for shape in shapes.values())
    given = f"{spec.rank} and {recipe.hidden}"
    check_memory("rank, hidden", given, needed, torch.device("cpu"))


def _shapes(spec: LayerConfig, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(
        recipe.kind,
        query_heads=spec.query_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        hidden=recipe.hidden,
        rank=spec.rank,
    )


class _Fit:
    """One layer's fit between two steps: parameters, optimiser, best so far."""

    def __init__(self, spec: LayerConfig, data: LayerData, recipe: Recipe, layer: int) -> None:
        count, _, tokens, _ = data.k.shape
        self.validation = recipe.held_out(count)
        self.training = count - self.validation
        self.spec, self.data, self.recipe, self.layer = spec, data, recipe, layer
        # Before that no head has lost anything.
        self.past = torch.arange(min(spec.capacities), tokens)
        self.steps_per_epoch = self.training // recipe.batch
        draws = generator(recipe.seed, layer, "weights")
        maps = untrained_layer(recipe.kind, _shapes(spec, recipe), draws)
        self.tensors = {name: t.requires_grad_() for name, t in maps.tensors.items()}
        self.optimizer = torch.optim.Adam(self.tensors.values(), lr=recipe.learning_rate)
        self.best = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.best_error = float("inf")
        self.stale = 0
        stride = max(1, len(self.past) // VALIDATION_ROWS)
        self.validation_rows = self.past[::stride]
        self.policy_error = self._error(None)
        if not self.policy_error > 0:
            raise ValueError(
                f"policy: {spec.policy} makes an error of {self.policy_error} in layer {layer}, so "
                "there is nothing to fit"
            )

    @property
    def finished(self) -> bool:
        """Whether validation has not improved for too long."""
        return self.recipe.patience is not None and self.stale >= self.recipe.patience

    def step(self, step: int) -> float:
        """One step of Adam; the loss, as a share of the policy's error on validation."""
        recipe = self.recipe
        epoch, within = divmod(step, self.steps_per_epoch)
        order = torch.randperm(
            self.training, generator=generator(recipe.seed, self.layer, "order", epoch)
        )
        chosen = order[within * recipe.batch : (within + 1) * recipe.batch]
        draws = generator(recipe.seed, self.layer, "step", step)
        rows = self.past
        if recipe.rows is not None:
            rows = self.past[torch.randperm(len(self.past), generator=draws)[: recipe.rows]]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step, self.steps_per_epoch)
        maps = LayerMaps(recipe.kind, self.tensors)
        if recipe.dropout:
            maps = DroppingMaps(maps.kind, maps.tensors, recipe.dropout, draws)
        self.optimizer.zero_grad()
        loss = self._loss(maps, chosen, rows) / self.policy_error
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def validate(self) -> float:
        """The validation error as a share of the policy's; the best maps are kept."""
        error = self._error(LayerMaps(self.recipe.kind, self.tensors)) / self.policy_error
        self.stale += 1
        if error < self.best_error:
            self.best_error, self.stale = error, 0
            self.best = {name: t.detach().clone() for name, t in self.tensors.items()}
        return error

    def _error(self, maps: LayerMaps | None) -> float:
        with torch.no_grad():
            losses = [
                float(self._loss(maps, torch.tensor([index]), self.validation_rows))
                for index in range(self.training, self.training + self.validation)
            ]
        return sum(losses) / len(losses)

    def _loss(self, maps: LayerMaps | None, chosen: Tensor, rows: Tensor) -> Tensor:
        wanted = self.data.out[chosen].float()[:, :, rows]
        return self.data.project(self.data.attend(maps, chosen, rows) - wanted).square().mean()

    def save(self, path: Path, step: int) -> None:
        """Write everything that `restore` needs."""
        done = step >= self.recipe.epochs * self.steps_per_epoch or self.finished
        facts = {"step": step, "best_error": self.best_error, "stale": self.stale, "done": done}
        save_fit(path, self.tensors, self.best, self.optimizer, facts)

    def restore(self, path: Path) -> int:
        """The step to go on with; 0 where there is no checkpoint."""
        facts = restore_fit(path, self.tensors, self.best, self.optimizer)
        if facts is None:
            return 0
        self.best_error, self.stale = best_of(facts["best_error"]), facts["stale"]
        return int(facts["step"])
