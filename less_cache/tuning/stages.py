"""The parts of a tuning that take time; each keeps what it found in files."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .._files import json_digest, json_text, parse_json, write_text
from ..config import CacheConfig
from ..distributed import Ray, run_tasks
from ..evaluation.perplexity import Contestant
from ..feature_maps import FeatureMaps
from ..policies import Policy
from ..quantization.transforms import Transforms
from ..training.end_to_end import distill_cache
from ..training.per_layer import train
from ..training.recipe import DistillRecipe
from ..training.runs import load_checkpoint, save_checkpoint
from .allocation import Offer, Plan
from .bases import LayerBases, bases_of, from_tensors, to_tensors
from .effort import Effort
from .judging import Judge, Verdict
from .measuring import LayerLosses, measure_layer
from .offers import config_of
from .refining import Factors, refine, trials
from .replay import Replay
from .states import QUICK, measure_state, quick_maps

SLOTS = (3, 6, 12, 24, 48, 96, 192, 384, 768)
"""Slots a head that are measured, up to the text's length; past the last one, its doubles."""
STATE_SLOTS = (3, 6, 12, 24, 48, 96)
"""Those that are measured with a low-rank state."""
FITTED = dataclasses.replace(QUICK, epochs=10, rows=128)


class Stages:
    """A model, its text and a folder for what is found.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    config
        Its shapes; rank 0.
    text
        From `effort.split`.
    effort
        For the steps of distillation.
    work
        The folder of what any budget goes on from.
    own
        That of this budget's.
    model_id
        The model's name, for maps.
    progress
        Show bars.
    on
        The cluster that `run` sends to; ``None``: this process.
    device
        Where a task puts the model. Default: where it is.
    """

    def __init__(
        self,
        model: Any,
        config: CacheConfig,
        text: Mapping[str, Tensor],
        effort: Effort,
        work: Path,
        *,
        own: Path,
        model_id: str | None,
        progress: bool,
        on: Ray | None = None,
        device: str | None = None,
    ) -> None:
        self.model, self.config, self.text, self.effort = model, config, text, effort
        self.work, self.own, self.model_id, self.progress = work, own, model_id, progress
        self.length = next(iter(text.values())).shape[1]
        self.on, self.device = on, device

    @functools.cached_property
    def replay(self) -> Replay:
        """The model on the text that heads are measured on."""
        return Replay(self.model, self.text["measuring"], self.config)

    @functools.cached_property
    def judge(self) -> Judge:
        """Judges finished caches on the text that is kept for that."""
        return Judge(self.model, self.text["validation"], self.work / "verdicts", batch=8)

    def __getstate__(self) -> dict[str, Any]:
        # A worker makes these itself: the predictions they hold take more to send than to make.
        own = {
            name: value for name, value in self.__dict__.items() if name not in ("replay", "judge")
        }
        return own | {"progress": False, "on": None}

    def run(self, stage: str, tasks: Sequence[tuple[Any, ...]], told: str | None = None) -> Any:
        """What one of the methods below finds for each task's arguments, here or on the cluster."""
        told = told if self.progress else None
        return run_tasks(_run_stage, tasks, shared=(self, stage), on=self.on, told=told)

    def calibrated(self) -> list[LayerBases]:
        """What every layer's bases of codes are fitted from."""
        path = self.work / "moments.safetensors"
        found = load_checkpoint(path)
        if found is None:
            text = self.text["calibration"]
            bases = bases_of(self.model, self.config, text, progress=self.progress)
            save_checkpoint(path, to_tensors(bases), {})
            return bases
        return from_tensors(found[0])

    def measured(self, layer: int, policies: Sequence[Policy], bases: LayerBases) -> LayerLosses:
        """What each head of a layer loses."""
        path = self.losses_path(layer)
        if path.exists():
            return LayerLosses.from_dict(parse_json(str(path), path.read_bytes()))
        slots = [tried for tried in SLOTS if tried < self.length]
        while 2 * slots[-1] < self.length:
            slots.append(2 * slots[-1])
        found = measure_layer(self.replay, layer, policies, slots, bases)
        write_text(path, json_text(found.to_dict()) + "\n")
        return found

    def losses_path(self, layer: int) -> Path:
        """Where `measured` keeps a layer's."""
        return self.work / "losses" / f"{layer:03d}.json"

    def with_states(
        self, layer: int, policy: Policy, ranks: Sequence[int]
    ) -> dict[tuple[Policy, int], list[dict[int, float]]]:
        """What each head of a layer loses with states of several ranks."""
        found = {}
        for rank in ranks:
            told = json_digest(policy.to_dict())[:8]
            folder = self.work / "states" / f"{layer:03d}-{rank}-{told}"
            path = folder / "losses.json"
            if not path.exists():
                text = self.text["fitting"]
                maps = quick_maps(
                    self.replay, text, layer, policy, rank, folder, progress=self.progress
                )
                slots = [tried for tried in STATE_SLOTS if tried < self.length]
                curves = measure_state(self.replay, layer, policy, maps, slots)
                write_text(path, json_text([[*curve.items()] for curve in curves]) + "\n")
            curves = [dict(map(tuple, curve)) for curve in json.loads(path.read_text())]
            found[policy, rank] = curves
        return found

    def refined(
        self, offers: Sequence[Sequence[Offer]], plan: Plan, total: int, bases: Sequence[LayerBases]
    ) -> Factors:
        """What heads' losses are to be multiplied with, as caches of so many bytes lose."""
        if not self.effort.rounds:
            return Factors.ones(offers)
        judge = Judge(self.model, self.text["refining"], self.work / "whole", batch=8)

        def measure(tried: Plan) -> float:
            config = config_of(self.config, tried)
            whole = Contestant("whole", config, None, self.transforms(tried, bases))
            return judge.judge(whole).divergence

        rounds = self.effort.rounds
        bar = tqdm(total=trials(offers, rounds), desc="refine", disable=not self.progress)
        with bar:
            return refine(offers, plan, total, measure, rounds=rounds, told=bar.update)

    def transforms(self, plan: Plan, bases: Sequence[LayerBases]) -> Transforms | None:
        """The bases that a plan's layers need, each for its own bits."""
        layers = [
            None if offer.quantization is None else own.fitted(offer.quantization)
            for own, offer in zip(bases, plan.offers, strict=True)
        ]
        if all(layer is None for layer in layers):
            return None
        return Transforms("calibrated", layers)

    def fitted(self, plan: Plan, transforms: Transforms | None) -> FeatureMaps:
        """Maps of the layers that have a state, each layer on its own."""
        maps = train(
            self.model,
            self.text["fitting"],
            config_of(self.config, plan),
            FITTED,
            self.own / "maps",
            transforms=transforms,
            model_id=self.model_id,
            progress=self.progress,
            on=self.on,
            device=self.device,
        )
        if maps is None:
            raise RuntimeError("maps: some layer was not fitted")
        return maps

    def distilled(
        self, plan: Plan, transforms: Transforms | None, maps: FeatureMaps | None
    ) -> tuple[FeatureMaps | None, Transforms | None]:
        """Maps and bases, all layers together, against the full cache's predictions."""
        text = self.text["distilling"]
        validation = min(8, max(1, len(text) // 8))
        config = config_of(self.config, plan)
        recipe = DistillRecipe(
            steps=self.effort.steps,
            batch=min(self.effort.batch, len(text) - validation),
            learning_rate=2e-3,
            validation=validation,
            validate_every=max(1, self.effort.steps // 4),
            # Where no score gains anything, evictions cost nothing to find.
            full_evictions=any(policy.gains for policy in config.policies),
            bases=transforms is not None,
        )
        maps, transforms = distill_cache(
            self.model,
            text,
            config,
            recipe,
            self.own / f"together-{recipe.steps}-{recipe.batch}",
            maps=maps,
            transforms=transforms,
            progress=self.progress,
        )
        return None if maps is None else maps.to("cpu"), transforms

    def judged(self, contestant: Contestant) -> Verdict:
        """What a cache makes of the text that is kept for that."""
        return self.judge.judge(contestant)


def _run_stage(stages: Stages, stage: str, *task: Any) -> Any:
    """A task: one call of a method."""
    if stages.device is not None:
        stages.model = stages.model.to(stages.device)
    return getattr(stages, stage)(*task)
