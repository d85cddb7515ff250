"""Training layer by layer: collect a layer's data, fit its maps, go to the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int
from .._files import scratch_folder
from ..config import CacheConfig
from ..feature_maps import FeatureMaps
from ..integrations.transformers.model_check import attention_modules, check_fit, check_model
from ..layer_maps import LayerMaps
from ..maps_io import public_name
from ..quantization.transforms import Transforms, check_transforms
from .collect import collect_layer
from .curves import save_curves
from .layer import check_can_fit, fit_layer
from .recipe import Recipe
from .runs import (
    Log,
    claim,
    differences,
    digest_tokens,
    load_checkpoint,
    model_digest,
    read_settings,
    save_checkpoint,
    transforms_record,
)

logger = logging.getLogger(__name__)


def train(
    model: Any,
    tokens: Tensor,
    config: CacheConfig,
    recipe: Recipe,
    out: Path,
    *,
    transforms: Transforms | None = None,
    layers: Sequence[int] | None = None,
    data_on_disk: bool = False,
    batch: int = 4,
    model_id: str | None = None,
    progress: bool = True,
) -> FeatureMaps | None:
    """Fit the maps of a model, each layer on its own.

    A run that was killed goes on when it is started again with the same arguments, to the same
    result bit for bit on the CPU. Layers may be spread over processes or machines by `layers`,
    each with a folder of its own or a shared one; `merge` puts them together.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokens
        [n, N] token ids.
    config
        Capacity, policy and rank that the maps are for.
    recipe
        How they are fitted.
    out
        Folder of the run: checkpoints, logs, a picture of them, and the finished maps.
    transforms
        The bases of codes; needed where a layer has calibrated ones.
    layers
        Which layers to fit. Default: all. Those of rank 0 have no maps, and are skipped.
    data_on_disk
        Keep a layer's data in files of `out` rather than in memory.
    batch
        Sequences a forward pass while data is collected.
    model_id
        Name of the model, kept with the maps.
    progress
        Show bars.

    Returns
    -------
    FeatureMaps or None
        The maps, also written to `out`; ``None`` where other layers are still missing.

    Raises
    ------
    ValueError, TypeError
        If config and model do not fit, the tokens are too few or too short, or `out` holds a run
        with other settings.
    """
    if not config.has_state:
        raise ValueError("config: rank is 0, expected a rank above 0: there is nothing to fit")
    chosen = [
        layer
        for layer in (range(config.num_layers) if layers is None else layers)
        if config.layer(layer).rank
    ]
    check_int("batch", batch, minimum=1)
    check_transforms(config, transforms)
    check_model(model)
    check_fit(model, attention_modules(model), config)
    sequences, length = tokens.shape
    for layer in chosen:
        check_can_fit(config.layer(layer), sequences, length, recipe, layer)
    claim(out, run_settings(model, config, recipe, tokens, model_id, transforms))
    for layer in chosen:
        folder = layer_folder(out, layer)
        spec = config.layer(layer)
        with scratch_folder(folder, "data.") if data_on_disk else nullcontext() as scratch:
            if (folder / "maps.safetensors").exists():
                logger.info("layer %d: fitted before", layer)
                continue
            started = time.monotonic()
            data = collect_layer(
                model,
                tokens,
                layer,
                spec,
                transforms=None if transforms is None else transforms[layer],
                batch=batch,
                folder=scratch,
                progress=progress,
            )
            maps = fit_layer(spec, data, recipe, folder, layer, progress=progress)
        save_checkpoint(folder / "maps.safetensors", maps.tensors, {"kind": maps.kind})
        logger.info("layer %d: fitted in %.0f s", layer, time.monotonic() - started)
    curves = {f"layer {layer}": log for layer, log in learning_curves(out).items()}
    save_curves(out, curves, "error, as a share of the policy's")
    if all(
        (layer_folder(out, i) / "maps.safetensors").exists()
        for i, rank in enumerate(config.ranks)
        if rank
    ):
        return merge([out], out)
    return None


def run_settings(
    model: Any,
    config: CacheConfig,
    recipe: Recipe,
    tokens: Tensor,
    model_id: str | None,
    transforms: Transforms | None = None,
) -> dict[str, Any]:
    """What makes two runs the same, as JSON-ready data."""
    return {
        "model_id": public_name(model_id),
        "model_sha256": model_digest(model),
        "config": config.to_dict(),
        **transforms_record(transforms),
        "recipe": recipe.to_dict(),
        "sequences": list(tokens.shape),
        "data_sha256": digest_tokens(tokens),
        "torch": torch.__version__,
    }


def layer_folder(out: Path, layer: int) -> Path:
    """Where a run keeps what belongs to one layer."""
    return out / "layers" / f"{layer:03d}"


def merge(folders: Sequence[Path], out: Path) -> FeatureMaps:
    """Put the layers of one training, fitted in several runs, together.

    Parameters
    ----------
    folders
        The runs' folders.
    out
        Where the maps are written.

    Raises
    ------
    FileNotFoundError
        If a folder is no run, or a layer is in none of them.
    ValueError
        If the runs' settings differ.
    """
    runs = []
    for folder in folders:
        path = folder / "run.json"
        if not path.exists():
            raise FileNotFoundError(
                f"folders: {folder} holds no run.json, so it is no run's folder"
            )
        runs.append(read_settings(path))
    settings = runs[0]
    for folder, run in zip(folders, runs, strict=True):
        if told := differences(run, settings):
            raise ValueError(
                f"folders: {folder} (there) and {folders[0]} (now) have other settings: {told}"
            )
    count, rank = (settings["config"][name] for name in ("num_layers", "rank"))
    layers: list[LayerMaps | None] = []
    errors: list[float | None] = []
    for layer, own in enumerate(rank if isinstance(rank, list) else [rank] * count):
        if not own:
            layers.append(None)
            errors.append(None)
            continue
        holders = [
            layer_folder(folder, layer)
            for folder in folders
            if (layer_folder(folder, layer) / "maps.safetensors").exists()
        ]
        if not holders:
            raise FileNotFoundError(
                f"folders: layer {layer} is in none of {list(map(str, folders))}"
            )
        fitted = load_checkpoint(holders[0] / "maps.safetensors")
        if fitted is None:
            raise FileNotFoundError(f"folders: {holders[0]} lost its maps meanwhile")
        layers.append(LayerMaps(settings["recipe"]["kind"], fitted[0]))
        found = load_checkpoint(holders[0] / "checkpoint.safetensors")
        errors.append(found[1]["best_error"] if found else None)
    record = {
        "method": "per layer",
        **{k: v for k, v in settings.items() if k != "model_id"},
        "validation_error_share": errors,
    }
    maps = FeatureMaps(layers, model_id=settings["model_id"], record=record)
    maps.save_pretrained(out)
    return maps


def learning_curves(out: Path) -> dict[int, list[dict[str, Any]]]:
    """The logs of a run's layers, by layer."""
    return {
        int(path.parent.name): Log(path, upto=2**62).read()
        for path in sorted((out / "layers").glob("*/log.jsonl"))
    }
