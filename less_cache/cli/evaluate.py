"""``less-cache eval``: maps on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .loading import (
    check_config,
    check_machine,
    config_for,
    length_for,
    load_model,
    model_name,
    vocabulary_of,
)
from .options import (
    SHIPPED,
    CapacityOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    PolicyOption,
    check_out,
    named_maps,
)
from .telling import say, warn


def evaluate(
    maps: Annotated[
        list[str],
        typer.Option(help="FOLDER, or NAME=FOLDER, of maps; may be given more than once."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    data: Annotated[
        str | None, typer.Option(help="As for train; default: the shipped held-out modules.")
    ] = None,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = "h2o",
    length: LengthOption = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most this many.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Continuations to compare; 0: none.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Their length.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Judge maps on held-out text: perplexity, gap recovered, agreement of continuations."""
    import torch

    from ..evaluation.comparison import compare, contestants_for
    from ..evaluation.perplexity import cut_windows
    from ..evaluation.report import as_table, check_can_draw, save_report
    from ..provenance import mismatches
    from ..training.data import Document, read_documents, tokenize

    # What needs no model is checked before one is loaded.
    check_can_draw()
    check_config(capacity, policy)
    check_out(out)
    check_machine(device, dtype)
    named = named_maps(maps)
    documents: list[Document]
    if data is None:
        from ..reference_model import held_out_documents

        documents = [(d.name, d.text) for d in held_out_documents()]
    else:
        documents = read_documents(data)
    loaded, tokenizer = load_model(model, device, dtype)
    config = config_for(loaded, capacity, policy, next(iter(named.values()))[0].rank)
    size = length_for(config, length)
    contestants_for(config, named, size)
    for name, entry in named.items():
        for told in mismatches(entry, config, model_name(model)):
            warn(f"maps {name}: {told}")
    cut = cut_windows(tokenize(documents, tokenizer, vocabulary=vocabulary_of(loaded)), size)
    if windows is not None:
        cut = cut[:: max(1, len(cut) // windows)][:windows]
    starts = None
    if prompts:
        if new_tokens >= size:
            raise ValueError(f"new_tokens: got {new_tokens}, expected fewer than length = {size}")
        chosen = cut[:: max(1, len(cut) // prompts)][:prompts]
        starts = torch.stack([window.ids[: size - new_tokens] for window in chosen])
    title = f"{model}: {policy} at {capacity}"
    comparison = compare(
        loaded, cut, config, named, prompts=starts, new_tokens=new_tokens, batch=batch
    )
    written = save_report(comparison, out, title)
    Console().print(as_table(comparison, title))
    say("Written: " + ", ".join(map(str, written)))
