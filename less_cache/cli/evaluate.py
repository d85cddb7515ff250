"""``less-cache eval``: maps on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..policies import DEFAULT_POLICY
from .given_cache import CacheOption, read_cache
from .loading import (
    check_config,
    check_machine,
    config_for,
    held_out,
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
from .quantized import (
    BitsOption,
    KeyBitsOption,
    TransformOption,
    TransformsOption,
    ValueBitsOption,
    read_codes,
)
from .telling import say, warn


def evaluate(
    context: typer.Context,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="FOLDER, or NAME=FOLDER, of maps; may be given more than once. Needed but with "
            "--bits or --transforms, where coded slots are judged without as well, or --cache."
        ),
    ] = None,
    cache: CacheOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    data: Annotated[
        str | None, typer.Option(help="As for train; default: the shipped held-out modules.")
    ] = None,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = DEFAULT_POLICY,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    length: LengthOption = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most this many.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Continuations to compare; 0: none.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Their length.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 4,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Judge maps, coded slots, both, or a whole cache on held-out text.

    Perplexity, gap recovered, agreement of continuations. Coded slots are compared with slots of
    16 bits a number for the same bytes.
    """
    import torch

    from ..evaluation.comparison import compare, contestants_for
    from ..evaluation.perplexity import cut_windows, spread_over
    from ..evaluation.report import as_table, check_can_draw, save_report
    from ..provenance import codes_text, mismatches
    from ..training.data import Document, read_documents, tokenize

    # What needs no model is checked before one is loaded.
    check_can_draw()
    whole = read_cache(context, cache)
    check_config(capacity, policy)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    if not maps and codes.quantization is None and cache is None:
        raise ValueError("maps: none given; expected --maps, --bits, --transforms or --cache")
    check_out(out)
    check_machine(device, dtype)
    named = named_maps(maps or [])
    if whole is not None:
        codes, named = whole.codes, whole.maps
    ranks = [entry.rank for entry in named.values()]
    documents: list[Document] = [*held_out()] if data is None else read_documents(data)
    loaded, tokenizer = load_model(model, device, dtype)
    if whole is not None:
        config = whole.config_for(loaded)
        title = f"{model}: {whole.title}"
    else:
        config = config_for(loaded, capacity, policy, ranks[0] if ranks else 0, codes)
        title = f"{model}: {policy} at {capacity}"
        for name, entry in named.items():
            for told in mismatches(entry, config, model_name(model), codes.transforms):
                warn(f"maps {name}: {told}")
    size = length_for(config, length)
    contestants_for(config, named, size, codes.transforms)
    cut = cut_windows(tokenize(documents, tokenizer, vocabulary=vocabulary_of(loaded)), size)
    if windows is not None:
        cut = spread_over(cut, windows)
    starts = None
    if prompts:
        if new_tokens >= size:
            raise ValueError(f"new_tokens: got {new_tokens}, expected fewer than length = {size}")
        chosen = spread_over(cut, prompts)
        starts = torch.stack([window.ids[: size - new_tokens] for window in chosen])
    if codes.quantization is not None:
        title += f", {codes_text(codes.quantization)}"
    comparison = compare(
        loaded,
        cut,
        config,
        named,
        transforms=codes.transforms,
        prompts=starts,
        new_tokens=new_tokens,
        batch=batch,
    )
    written = save_report(comparison, out, title)
    Console().print(as_table(comparison, title))
    say("Written: " + ", ".join(map(str, written)))
