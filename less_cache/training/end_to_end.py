"""End-to-end distillation: all layers' maps together, and the bases of codes; the model frozen.

The loss is the Kullback-Leibler divergence of the next-token distribution under the small cache
from that under the full one, over the positions that the small cache changes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..integrations.transformers.model_check import attention_modules, check_fit, check_model
from ..quantization.transforms import FILE, Transforms, check_transforms
from .curves import save_curves
from .distillation import Distillation, first_changed
from .recipe import DistillRecipe
from .runs import Log, claim, digest_tokens, model_digest, transforms_record

SAVE_EVERY_SECONDS = 60.0
logger = logging.getLogger(__name__)


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

    As `distill_cache`, of which it gives the maps alone.
    """
    found, _ = distill_cache(
        model, tokens, config, recipe, out, maps=maps, transforms=transforms, progress=progress
    )
    assert found is not None
    return found


def distill_cache(
    model: Any,
    tokens: Tensor,
    config: CacheConfig,
    recipe: DistillRecipe,
    out: Path,
    *,
    maps: FeatureMaps | None = None,
    transforms: Transforms | None = None,
    progress: bool = True,
) -> tuple[FeatureMaps | None, Transforms | None]:
    """Fit all layers' maps to the full cache's logits; with ``recipe.bases`` codes' bases as well.

    A run that was killed goes on when it is started again with the same arguments, to the same
    result bit for bit on the CPU.

    Parameters
    ----------
    model
        A transformers model that `attach` takes; its weights do not change.
    tokens
        [n, N] token ids.
    config
        Capacity, policy, rank and codes that they are for.
    recipe
        The numbers.
    out
        Folder of the run: checkpoint, log, a picture of it, and what was fitted.
    maps
        Where to start: those of `train`; ``None`` where no layer has a state.
    transforms
        The bases of codes; needed where a layer has calibrated ones.
    progress
        Show a bar.

    Returns
    -------
    maps, transforms
        Those of the least validation loss, also written to `out`; those given, where they are not
        fitted.

    Raises
    ------
    ValueError
        If config, maps and model do not fit each other, there is nothing to fit, the tokens are too
        few or too short, `out` holds a run with other settings, or the loss becomes infinite.
    """
    check_transforms(config, transforms)
    if maps is not None:
        maps.check_against(config)
    elif config.has_state:
        raise ValueError("maps: got None, but the config's rank is above 0")
    elif not recipe.bases:
        raise ValueError("maps: got None, and recipe.bases is False: there is nothing to fit")
    if recipe.bases and transforms is None:
        raise ValueError("transforms: got None, expected bases to fit, as recipe.bases is True")
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
    if tokens.shape[1] <= (least := first_changed(config, recipe)):
        raise ValueError(
            f"tokens: sequences of {tokens.shape[1]} lose nothing to a capacity of {least}; "
            "expected longer ones"
        )
    settings = {
        "model_sha256": model_digest(model),
        "config": config.to_dict(),
        **transforms_record(transforms),
        "distill": dataclasses.asdict(recipe),
        "start": None if maps is None else maps.digest,
        "data_sha256": digest_tokens(tokens),
        "torch": torch.__version__,
    }
    claim(out, settings)
    run = Distillation(model, tokens, config, recipe, maps, transforms)
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
    bases = run.best_transforms()
    record = {
        **({} if maps is None else maps.record),
        "method": "per layer, then end to end",
        # The bases that the maps go with are those of the end.
        "distill": settings | transforms_record(bases),
        "validation_loss": run.best_loss,
    }
    fitted = run.best_maps(record)
    if fitted is not None:
        fitted.save_pretrained(out)
    if recipe.bases and bases is not None:
        bases.save(out / FILE)
    save_curves(out, {"end to end": log.read()}, "validation loss, nats a token")
    return fitted, bases
