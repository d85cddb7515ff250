"""``less-cache tune``: the best cache for a number of bytes, in one folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .._checks import check_real
from .loading import check_machine, load_model, model_name, tokens_for
from .options import (
    SHIPPED,
    DataOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    SequencesOption,
    check_out,
    parse_layers,
)
from .ray_options import GpusOption, RayOption, RetriesOption, cluster
from .telling import resumable, say
from .train import OutOption


def tune(
    data: DataOption,
    out: OutOption,
    model: ModelOption = SHIPPED,
    budget: Annotated[
        str,
        typer.Option(
            help="Bytes of one sequence (300000, 2.5M), or a share of the full cache's in 16 bits."
        ),
    ] = "5%",
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for what other budgets go on from too; default: in --out."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of that full cache; default: the model's positions."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="About how long it may take; default: as long as it does.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Of training all layers' maps together.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the folder, for its card: an SPDX name.")
    ] = None,
    length: LengthOption = None,
    sequences: SequencesOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Only measure these: 0:8, or 3. For machines that share --work; then once without."
        ),
    ] = None,
    ray: RayOption = None,
    gpus: GpusOption = 0.0,
    retries: RetriesOption = 3,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Find the best cache for a number of bytes: slots by head, bits, states, policy."""
    import dataclasses

    from ..config import CacheConfig
    from ..evaluation.report import check_can_draw
    from ..integrations.transformers.model_check import check_model
    from ..policies import FullCache
    from ..training.data import read_documents
    from ..tuning import Effort, measure_layers, save_report
    from ..tuning import tune as run

    if minutes is not None:
        check_real("minutes", minutes, above=0.0)
        if steps is not None:
            raise ValueError("steps: given, and minutes too, which choose them; leave one out")
    if layers is not None and ray is not None:
        raise ValueError("layers: given, and ray too, which spreads all of them; leave one out")
    check_can_draw()
    check_out(out)
    on = cluster(ray, gpus, retries, device)
    # On a cluster the workers have the device, and this process perhaps none.
    here = device if on is None else "cpu"
    check_machine(here, dtype)
    documents = read_documents(data)
    with resumable():
        loaded, tokenizer = load_model(model, here, dtype)
        check_model(loaded)
        shapes = CacheConfig.from_model(loaded.config, capacity=1, policy=FullCache(), rank=0)
        part = parse_layers(layers, shapes.num_layers)
        tokens = tokens_for(loaded, tokenizer, documents, shapes, length, sequences)
        effort = None if steps is None else dataclasses.replace(Effort(), steps=steps)
        name = model_name(model)
        if part is not None:
            folder = out / "work" if work is None else work
            left = measure_layers(
                loaded,
                tokens,
                folder,
                part,
                effort=effort,
                minutes=minutes,
                model_id=name,
                device=device,
            )
            told = f"; still to be measured: {', '.join(map(str, left))}" if left else ""
            say(f"Measured{told}. When no layer is left: the same command without --layers.")
            return
        tuned = run(
            loaded,
            tokens,
            budget,
            out,
            work=work,
            context=context,
            effort=effort,
            minutes=minutes,
            model_id=name,
            licence=licence,
            on=on,
            device=device,
        )
    for path in save_report(tuned.report, out):
        say(f"Report: {path}")
    config = tuned.recipe.config
    record = tuned.recipe.record
    lost = record["validation"]["divergence"]
    say(
        f"{config.bytes_per_sequence():,} bytes a sequence, {record['share']:.2%} of the full "
        f"cache's; {lost:.4f} nats a token from its predictions, on text kept for that."
    )
    say(f"Cache: {out}. Next:")
    say(shlex.join(["less-cache", "eval", "--model", model, "--cache", str(out)]))
