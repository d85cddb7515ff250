"""A run of distillation between two steps: parameters, optimiser, the best so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..integrations.transformers.teacher_forcing import (
    small_cache_logits,
    times_under_full_cache,
)
from ..layer_config import LayerConfig
from ..layer_maps import LayerMaps
from ..quantization.transforms import LayerTransforms, Transforms
from ..teacher_forced import stored_pairs
from .collect import SIMULATED_AT_ONCE
from .learned_bases import LearnedBases
from .recipe import DistillRecipe, generator
from .runs import best_of, restore_fit, save_fit


class Distillation:
    """What `distill_cache` does step by step; its parameters are those of `distill_cache`."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        config: CacheConfig,
        recipe: DistillRecipe,
        maps: FeatureMaps | None,
        transforms: Transforms | None,
    ) -> None:
        self.model, self.config, self.recipe = model, config, recipe
        self.start, self.transforms = maps, transforms
        self.tokens = tokens
        self.known: dict[bytes, list[Tensor]] = {}
        self.training = tokens[: -recipe.validation]
        self.held = tokens[-recipe.validation :]
        self.past = first_changed(config, recipe)
        # Of maps, as "layer.tensor"; of bases, as "bases.layer.tensor".
        self.parameters: dict[str, Tensor] = {}
        for i, own in enumerate(maps or ()):
            for name, t in ({} if own is None else own.tensors).items():
                parameter = t.detach().clone().float().to(model.device).requires_grad_()
                self.parameters[f"{i}.{name}"] = parameter
        self.bases: dict[int, LearnedBases] = {}
        if recipe.bases and transforms is not None:
            for i, basis in enumerate(transforms):
                if basis is not None:
                    self.bases[i] = LearnedBases(basis, model.device)
                    own_parameters = self.bases[i].parameters
                    self.parameters |= {f"bases.{i}.{n}": p for n, p in own_parameters.items()}
        self.maps = self._layer_maps(self.parameters)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=recipe.learning_rate)
        self.best = self._copies()
        self.best_loss = float("inf")

    def _copies(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.parameters.items()}

    def _layer_maps(self, parameters: dict[str, Tensor]) -> list[LayerMaps | None] | None:
        if self.start is None:
            return None
        return [
            own and LayerMaps(own.kind, {name: parameters[f"{i}.{name}"] for name in own.tensors})
            for i, own in enumerate(self.start)
        ]

    def best_maps(self, record: dict[str, Any]) -> FeatureMaps | None:
        """The maps of the least validation loss."""
        layers = self._layer_maps(self.best)
        if self.start is None or layers is None:
            return None
        return FeatureMaps(layers, model_id=self.start.model_id, record=record)

    def best_transforms(self) -> Transforms | None:
        """The bases of the least validation loss; those given, where none are fitted."""
        if self.transforms is None or not self.bases:
            return self.transforms
        layers: list[LayerTransforms | None] = []
        for i, given in enumerate(self.transforms):
            if (own := self.bases.get(i)) is None:
                layers.append(given)
            else:
                layers.append(
                    own.finished({n: self.best[f"bases.{i}.{n}"] for n in own.parameters})
                )
        bits = [self.transforms.bits_of(i) for i in range(len(layers))]
        return Transforms(
            self.transforms.kind,
            layers,
            key_bits=[key for key, _ in bits],
            value_bits=[value for _, value in bits],
        )

    def _stored(
        self, index: int, layer: LayerConfig, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        if index in self.bases:
            return self.bases[index].stored_pairs(layer, k, v)
        basis = None if self.transforms is None else self.transforms[index]
        return stored_pairs(layer, k, v, basis)

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
        parameters = [*self.parameters.values()]
        total = 0.0
        for part in chosen.split(recipe.micro_batch):
            loss = self._loss(self.training[part]) * (len(part) / len(chosen))
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        self.optimizer.step()
        return total

    def validate(self) -> float:
        """The loss on the sequences kept for it; the best parameters are kept."""
        with torch.no_grad():
            losses = [
                float(self._loss(part)) * len(part)
                for part in self.held.split(self.recipe.micro_batch)
            ]
        loss = sum(losses) / len(self.held)
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = self._copies()
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
            stored=self._stored,
        )
        found = logits[:, self.past :].float()
        return F.kl_div(
            found.log_softmax(2), wanted.log_softmax(2), reduction="sum", log_target=True
        ) / (found.shape[0] * found.shape[1])

    def save(self, path: Path, step: int) -> None:
        """Write everything that `restore` needs."""
        facts = {"step": step, "best_loss": self.best_loss}
        save_fit(path, self.parameters, self.best, self.optimizer, facts)

    def restore(self, path: Path) -> int:
        """The step to go on with; 0 where there is no checkpoint."""
        facts = restore_fit(path, self.parameters, self.best, self.optimizer)
        if facts is None:
            return 0
        self.best_loss = best_of(facts["best_loss"])
        return int(facts["step"])


def first_changed(config: CacheConfig, recipe: DistillRecipe) -> int:
    """The first position whose prediction the parameters change.

    Maps change nothing before some head's slots are full; codes change all but the first.
    """
    if recipe.bases:
        return 1
    return min(min(layer.capacities) for layer in config.layers if layer.rank)
