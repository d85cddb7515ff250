"""``less-cache train``, ``distill`` and ``merge``: feature maps for a model."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..policies import DEFAULT_POLICY
from .loading import (
    check_config,
    check_machine,
    config_for,
    load_model,
    model_name,
    tokens_for,
)
from .options import (
    SHIPPED,
    CapacityOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    PolicyOption,
    SequencesOption,
    check_out,
    named_maps,
    parse_layers,
)
from .quantized import (
    BitsOption,
    Codes,
    KeyBitsOption,
    TransformOption,
    TransformsOption,
    ValueBitsOption,
    read_codes,
)
from .ray_options import GpusOption, RayOption, RetriesOption, cluster
from .telling import resumable, say

if TYPE_CHECKING:
    from ..feature_maps import FeatureMaps

OutOption = Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")]


def train(
    data: DataOption,
    out: OutOption,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = DEFAULT_POLICY,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    rank: Annotated[int, typer.Option(min=1, help="Rows of the low-rank state.")] = 8,
    recipe: Annotated[str, typer.Option(help="paper, or fast: exp maps and sampled rows.")] = (
        "paper"
    ),
    kind: Annotated[str | None, typer.Option(help="paper or exp; overrides the recipe.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    rows: Annotated[int | None, typer.Option(help="Query rows a step; overrides.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Overrides the recipe.")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without gain before a stop.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    length: LengthOption = None,
    sequences: SequencesOption = None,
    layers: Annotated[str | None, typer.Option(help="Only these: 0:8, or 3.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a pass when collecting.")] = 4,
    data_on_disk: Annotated[bool, typer.Option(help="Keep a layer's data in files.")] = False,
    ray: RayOption = None,
    gpus: GpusOption = 0.0,
    retries: RetriesOption = 3,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit feature maps to a model, layer by layer."""
    from ..training import RECIPES
    from ..training import train as run
    from ..training.data import read_documents

    if recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}, expected one of {', '.join(RECIPES)}")
    changes: dict[str, Any] = {
        "kind": kind,
        "hidden": hidden,
        "epochs": epochs,
        "rows": rows,
        "learning_rate": learning_rate,
        "patience": patience,
        "seed": seed,
    }
    chosen = dataclasses.replace(
        RECIPES[recipe], **{k: v for k, v in changes.items() if v is not None}
    )
    # What needs no model is checked before one is loaded.
    check_config(capacity, policy)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    check_out(out)
    on = cluster(ray, gpus, retries, device)
    # On a cluster the workers have the device, and this process perhaps none.
    here = device if on is None else "cpu"
    check_machine(here, dtype)
    documents = read_documents(data)
    with resumable():
        loaded, tokenizer = load_model(model, here, dtype)
        config = config_for(loaded, capacity, policy, rank, codes)
        part = parse_layers(layers, config.num_layers)
        tokens = tokens_for(loaded, tokenizer, documents, config, length, sequences)
        maps = run(
            loaded,
            tokens,
            config,
            chosen,
            out,
            transforms=codes.transforms,
            layers=part,
            data_on_disk=data_on_disk,
            batch=batch,
            model_id=model_name(model),
            on=on,
            device=device,
        )
    if maps is None:
        merged = shlex.join(["less-cache", "merge", str(out), "--out"])
        say("Layers done; the others are still missing. With the folders of the other parts, then:")
        say(f"{merged} WHOLE PARTS...")
    else:
        _say_errors(maps)
        say(f"Maps: {out}. Next:")
        say(_judge(model, capacity, policy, codes, out))


def distill(
    data: DataOption,
    maps: Annotated[
        str, typer.Option(help="FOLDER, or NAME=FOLDER, of the per-layer maps to start from.")
    ],
    out: OutOption,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = DEFAULT_POLICY,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    bases: Annotated[
        bool, typer.Option("--bases", help="Fit the bases of --transforms as well.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 1e-3,
    length: LengthOption = None,
    sequences: SequencesOption = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    micro_batch: Annotated[
        int, typer.Option(min=1, help="Sequences at a time; more take memory.")
    ] = 1,
    recompute: Annotated[bool, typer.Option(help="Spend time to save memory.")] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit all layers' maps together, to the model's logits under the full cache."""
    from ..training import DistillRecipe
    from ..training import distill as run
    from ..training.data import read_documents

    recipe = DistillRecipe(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        micro_batch=micro_batch,
        recompute=recompute,
        bases=bases,
    )
    check_config(capacity, policy)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    if bases and codes.transforms is None:
        raise ValueError("bases: given, but no --transforms to begin with")
    check_out(out)
    check_machine(device, dtype)
    (start,) = named_maps([maps]).values()
    documents = read_documents(data)
    with resumable():
        loaded, tokenizer = load_model(model, device, dtype)
        config = config_for(loaded, capacity, policy, start.rank, codes)
        tokens = tokens_for(loaded, tokenizer, documents, config, length, sequences)
        fitted = run(loaded, tokens, config, start, recipe, out, transforms=codes.transforms)
    say(f"Validation loss: {fitted.record['validation_loss']:.4f} nats a token")
    say(f"Maps{' and bases' if bases else ''}: {out}. Next:")
    if bases:
        codes = dataclasses.replace(codes, options=codes.options | {"--transforms": str(out)})
    say(_judge(model, capacity, policy, codes, out))


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs that share settings.")],
    out: Annotated[Path, typer.Option(help="Where the maps are written.")],
) -> None:
    """Put layers that were fitted in several runs together."""
    from ..training import merge as run

    check_out(out)
    maps = run(folders, out)
    _say_errors(maps)
    say(f"Maps: {out}")


def _judge(model: str, capacity: str, policy: str, codes: Codes, out: Path) -> str:
    """The command that judges these maps."""
    options = {
        "--model": model,
        "--capacity": capacity,
        "--policy": policy,
        **codes.options,
        "--maps": f"LESS={out}",
    }
    return shlex.join(["less-cache", "eval", *(word for pair in options.items() for word in pair)])


def _say_errors(maps: FeatureMaps) -> None:
    shares = maps.record["validation_error_share"]
    layers = ", ".join(
        f"{layer}: " + ("?" if share is None else f"{share:.2f}")
        for layer, (own, share) in enumerate(zip(maps, shares, strict=True))
        if own is not None
    )
    say(f"Validation error by layer, as a share of the policy's own: {layers}")
