"""End-to-end distillation: all layers' maps together, the model frozen.

The loss is the Kullback-Leibler divergence of the next-token distribution under the small cache
from that under the full one, over positions past the budget.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .._checks import check_int, check_real
from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..integrations.transformers.model_check import attention_modules, check_fit, check_model
from ..integrations.transformers.teacher_forcing import (
    small_cache_logits,
    times_under_full_cache,
)
from ..layer_maps import LayerMaps
from ..quantization.transforms import Transforms, check_transforms
from .collect import SIMULATED_AT_ONCE
from .curves import save_curves
from .recipe import generator
from .runs import (
    Log,
    claim,
    digest_tokens,
    load_checkpoint,
    load_optimizer,
    model_digest,
    optimizer_tensors,
    save_checkpoint,
    transforms_record,
)

SAVE_EVERY_SECONDS = 60.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillRecipe:
    """How the maps of all layers are fitted together.

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


def distill(
    model: Any,
    tokens: Tensor,
    config: CacheConfig,
    maps: FeatureMaps,
    recipe: DistillRecipe,
    out: Path,
    *,
    transforms: Transforms | None = None,
    progress: bool = True,
) -> FeatureMaps:
    """Fit all layers' maps to the model's logits under the full cache.

    A run that was killed goes on when it is started again with the same arguments, to the same
    result bit for bit on the CPU.

    Parameters
    ----------
    model
        A transformers model that `attach` takes; its weights do not change.
    tokens
        [n, N] token ids.
    config
        Capacity, policy and rank that the maps are for.
    maps
        Where to start: those of `train`.
    recipe
        The numbers.
    out
        Folder of the run: checkpoint, log, a picture of it, and the finished maps.
    transforms
        The bases of codes; needed where a layer has calibrated ones.
    progress
        Show a bar.

    Returns
    -------
    FeatureMaps
        Those of the least validation loss, also written to `out`.

    Raises
    ------
    ValueError
        If config, maps and model do not fit each other, the tokens are too few or too short, `out`
        holds a run with other settings, or the loss becomes infinite.
    """
    maps.check_against(config)
    check_transforms(config, transforms)
    if len(tokens) < recipe.validation + recipe.batch:
        raise ValueError(
            f"tokens: got {len(tokens)} sequences, "
            f"expected at least {recipe.validation + recipe.batch}"
        )
    check_model(model)
    check_fit(model, attention_modules(model), config)
    for layer in config.layers:
        policy = layer.policy
        if layer.rank and not policy.evicts:
            raise ValueError(f"policy: {policy} evicts nothing, so there is nothing to fit")
    if tokens.shape[1] <= (least := _least(config)):
        raise ValueError(
            f"tokens: sequences of {tokens.shape[1]} lose nothing to a capacity of {least}; "
            "expected longer ones"
        )
    settings = {
        "model_sha256": model_digest(model),
        "config": config.to_dict(),
        **transforms_record(transforms),
        "distill": dataclasses.asdict(recipe),
        "start": maps.digest,
        "data_sha256": digest_tokens(tokens),
        "torch": torch.__version__,
    }
    claim(out, settings)
    run = _Distillation(model, tokens, config, maps, recipe, transforms)
    path = out / "checkpoint.safetensors"
    step = run.restore(path)
    if step:
        logger.info("goes on after step %d", step)
    log = Log(out / "log.jsonl", step)
    saved, diverged = time.monotonic(), False
    bar = tqdm(total=recipe.steps, initial=step, desc="distill", unit="step", disable=not progress)
    if step == 0:
        log.write(step=0, validation=run.validate())
    with bar:
        while step < recipe.steps and not diverged:
            loss = run.step(step)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", best=f"{run.best_loss:.4f}")
            diverged = not math.isfinite(loss)
            if step % recipe.validate_every == 0 or step == recipe.steps:
                validation = run.validate()
                log.write(step=step, train=loss, validation=validation)
                logger.info("step %d: validation %.4f", step, validation)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                run.save(path, step)
                saved = time.monotonic()
    run.save(path, step)
    if diverged or not math.isfinite(run.best_loss):
        raise ValueError(
            f"learning_rate: got {recipe.learning_rate}, with which the loss was no number any "
            f"more after step {step}; take a smaller one"
        )
    record = {
        **maps.record,
        "method": "per layer, then end to end",
        "distill": settings,
        "validation_loss": run.best_loss,
    }
    best = run.maps_of(run.best)
    fitted = FeatureMaps(best, model_id=maps.model_id, record=record)
    fitted.save_pretrained(out)
    save_curves(out, {"end to end": log.read()}, "validation loss, nats a token")
    return fitted


def _least(config: CacheConfig) -> int:
    """The fewest slots of any head of a layer with maps: before that they change nothing."""
    return min(min(layer.capacities) for layer in config.layers if layer.rank)


class _Distillation:
    """The run between two steps: parameters, optimiser, best so far."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        config: CacheConfig,
        maps: FeatureMaps,
        recipe: DistillRecipe,
        transforms: Transforms | None = None,
    ) -> None:
        self.model, self.config, self.recipe = model, config, recipe
        self.transforms = transforms
        self.tokens = tokens
        self.known: dict[bytes, list[Tensor]] = {}
        self.training = tokens[: -recipe.validation]
        self.held = tokens[-recipe.validation :]
        self.past = _least(config)
        self.kind = maps.kind
        # Empty for a layer without maps.
        self.layers = [
            {
                name: t.detach().clone().float().to(model.device).requires_grad_()
                for name, t in ({} if layer is None else layer.tensors).items()
            }
            for layer in maps
        ]
        self.maps = self.maps_of(self.layers)
        parameters = [t for layer in self.layers for t in layer.values()]
        self.optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
        self.parameters = parameters
        self.best = [
            {name: t.detach().clone() for name, t in layer.items()} for layer in self.layers
        ]
        self.best_loss = float("inf")

    def maps_of(self, layers: list[dict[str, Tensor]]) -> list[LayerMaps | None]:
        """The maps that some parameters are, by layer."""
        return [LayerMaps(self.kind, tensors) if tensors else None for tensors in layers]

    def _times(self, ids: Tensor) -> list[Tensor] | None:
        """When pairs leave, for sequences that stand in `tokens`; ``None``: to be worked out."""
        if not self.recipe.full_evictions:
            return None
        found = []
        for row in ids:
            key = row.numpy().tobytes()
            if key not in self.known:
                at = next(i for i, own in enumerate(self.tokens) if torch.equal(own, row))
                self._learn(at)
            found.append(self.known[key])
        return [torch.stack(rows).to(self.model.device) for rows in zip(*found, strict=True)]

    def _learn(self, at: int) -> None:
        """Evictions of the sequence of that place and those around it."""
        first = at - at % SIMULATED_AT_ONCE
        chosen = self.tokens[first : first + SIMULATED_AT_ONCE]
        times = times_under_full_cache(
            self.model, self.config, chosen.to(self.model.device), transforms=self.transforms
        )
        for place, row in enumerate(chosen):
            self.known[row.numpy().tobytes()] = [layer[place].cpu() for layer in times]

    def step(self, step: int) -> float:
        """One step of Adam; the loss in nats a token."""
        recipe = self.recipe
        per_epoch = max(1, len(self.training) // recipe.batch)
        epoch, within = divmod(step, per_epoch)
        order = torch.randperm(
            len(self.training), generator=generator(recipe.seed, "distill", epoch)
        )
        chosen = order[within * recipe.batch : (within + 1) * recipe.batch]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        self.optimizer.zero_grad()
        total = 0.0
        for part in chosen.split(recipe.micro_batch):
            loss = self._loss(self.training[part]) * (len(part) / len(chosen))
            gradients = torch.autograd.grad(loss, self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        return total

    def validate(self) -> float:
        """The loss on the sequences kept for it; the best maps are kept."""
        with torch.no_grad():
            losses = [
                float(self._loss(part)) * len(part)
                for part in self.held.split(self.recipe.micro_batch)
            ]
        loss = sum(losses) / len(self.held)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = [
                {name: t.detach().clone() for name, t in layer.items()} for layer in self.layers
            ]
        return loss

    def _loss(self, ids: Tensor) -> Tensor:
        times = self._times(ids)
        ids = ids.to(self.model.device)
        with torch.no_grad():
            wanted = self.model(ids, use_cache=False).logits[:, self.past :].float()
        logits = small_cache_logits(
            self.model,
            self.config,
            self.maps,
            ids,
            recompute=self.recipe.recompute,
            transforms=self.transforms,
            times=times,
        )
        found = logits[:, self.past :].float()
        return F.kl_div(
            found.log_softmax(2), wanted.log_softmax(2), reduction="sum", log_target=True
        ) / (found.shape[0] * found.shape[1])

    def save(self, path: Path, step: int) -> None:
        """Write everything that `restore` needs."""
        tensors = dict(optimizer_tensors(self.optimizer))
        for kind, layers in (("now", self.layers), ("best", self.best)):
            for i, layer in enumerate(layers):
                tensors.update({f"{kind}.{i}.{name}": t for name, t in layer.items()})
        save_checkpoint(path, tensors, {"step": step, "best_loss": self.best_loss})

    def restore(self, path: Path) -> int:
        """The step to go on with; 0 where there is no checkpoint."""
        found = load_checkpoint(path)
        if found is None:
            return 0
        tensors, facts = found
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                for name, parameter in layer.items():
                    parameter.copy_(tensors[f"now.{i}.{name}"])
                    self.best[i][name] = tensors[f"best.{i}.{name}"].to(parameter.device)
        load_optimizer(self.optimizer, tensors)
        best = facts["best_loss"]
        self.best_loss = float("inf") if best is None else best
        return int(facts["step"])
