"""The feature maps that ship with the reference model, and the script that made them.

``python -m less_cache.reference_model.shipped_maps --out DIR`` trains them: each layer on its own,
then all together, on windows of the model's own training text.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from less_cache import CacheConfig, FeatureMaps, Policy

FOLDER = Path(__file__).parent / "maps"
PER_LAYER, END_TO_END = "per-layer", "end-to-end"
SEED = 11
RANK = 8


@dataclass(frozen=True)
class Target:
    """A cache that maps are shipped for.

    Attributes
    ----------
    policy : str
        As `parse_policy` reads it.
    share : float
        Capacity as a share of the model's positions.
    """

    policy: str
    share: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.policy}-{round(self.share * 100)}"


TARGETS = (Target("sinkwindow", 0.05), Target("h2o", 0.05), Target("h2o", 0.10))


def shipped(policy: str, share: float, method: str = END_TO_END) -> "FeatureMaps":
    """Load maps that ship with the reference model.

    Parameters
    ----------
    policy : str
        ``"h2o"`` or ``"sinkwindow"``.
    share : float
        Capacity as a share of the model's positions: 0.05, or 0.1 for H2O.
    method : str
        ``"end-to-end"``, or ``"per-layer"``: what that was started from.

    Returns
    -------
    FeatureMaps
        For all layers.

    Raises
    ------
    ValueError
        If there are none for that cache.
    """
    from less_cache import FeatureMaps

    folder = FOLDER / Target(policy, share).name / method
    if not folder.is_dir():
        there = sorted(
            str(path.parent.relative_to(FOLDER)) for path in FOLDER.glob("*/*/*.safetensors")
        )
        raise ValueError(
            f"policy, share, method: no maps ship for {folder.relative_to(FOLDER)}, "
            f"only for {', '.join(there)}"
        )
    return FeatureMaps.from_pretrained(folder)


def config_for(target: Target) -> "CacheConfig":
    """Return the cache's configuration on the reference model, in float32.

    Parameters
    ----------
    target : Target
        Policy and capacity.
    """
    from transformers import AutoConfig

    from less_cache import CacheConfig
    from less_cache.policies import parse_policy
    from less_cache.reference_model import path

    policy: Policy = parse_policy(target.policy)
    model_config = AutoConfig.from_pretrained(path())
    return CacheConfig.from_model(
        model_config, capacity=target.share, policy=policy, rank=RANK, dtype="float32"
    )


def training_windows(count: int) -> "torch.Tensor":
    """Return token ids [count, context] from the model's own training text.

    Parameters
    ----------
    count : int
        Number of windows.
    """
    from less_cache.reference_model import load, training_documents
    from less_cache.reference_model.windows import Windows, token_streams

    model, tokenizer = load()
    context = model.config.max_position_embeddings
    streams = token_streams(training_documents(), tokenizer, context)
    return Windows(streams, context, SEED).batch(0, count)[:, :context].contiguous()


def store(maps: "FeatureMaps", folder: Path) -> None:
    """Write maps in float16, which halves what ships and changes no figure of the evaluation.

    Parameters
    ----------
    maps : FeatureMaps
        The trained maps.
    folder : Path
        Where to.
    """
    import torch

    from less_cache import FeatureMaps
    from less_cache.layer_maps import FIRST_LAYERS, LayerMaps

    layers = [
        layer
        and LayerMaps(
            layer.kind,
            {
                name: tensor.to(torch.float16 if name in FIRST_LAYERS else torch.float32)
                for name, tensor in layer.tensors.items()
            },
        )
        for layer in maps
    ]
    FeatureMaps(layers, model_id=maps.model_id, record=maps.record).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from the command line; the same command resumes a run that was stopped."""
    import torch

    from less_cache.reference_model import NAME, load
    from less_cache.training import DistillRecipe, Recipe, distill, train

    parser = argparse.ArgumentParser(description="Train the reference model's feature maps.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--publish", type=Path, help="another folder for the finished maps")
    parser.add_argument("--only", choices=[target.name for target in TARGETS])
    parser.add_argument("--sequences", type=int, default=420)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--kind", default="exp")
    parser.add_argument("--distill-steps", type=int, default=140)
    parser.add_argument("--distill-rate", type=float, default=4e-3)
    options = parser.parse_args(arguments)
    recipe = Recipe(
        kind=options.kind,
        hidden=options.hidden,
        epochs=options.epochs,
        rows=96,
        learning_rate=3e-3,
        schedule="cosine",
        dropout=0.0,
        validation=0.05,
    )
    together = DistillRecipe(
        steps=options.distill_steps,
        learning_rate=options.distill_rate,
        micro_batch=4,
        recompute=False,
    )
    model, _ = load()
    # Distillation goes once over text that the layers were not fitted to.
    windows = training_windows(options.sequences + together.steps * together.batch)
    tokens, fresh = windows[: options.sequences], windows[options.sequences :]
    held = tokens[-together.validation :]
    for target in TARGETS:
        if options.only not in (None, target.name):
            continue
        config = config_for(target)
        runs = options.out / target.name
        per_layer = train(model, tokens, config, recipe, runs / PER_LAYER, model_id=NAME)
        if per_layer is None:
            raise AssertionError("all layers are trained in one run")
        end_to_end = distill(
            model,
            torch.cat([fresh, held]),
            config,
            per_layer,
            together,
            runs / END_TO_END,
        )
        if options.publish is not None:
            store(per_layer, options.publish / target.name / PER_LAYER)
            store(end_to_end, options.publish / target.name / END_TO_END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
