"""``less-cache reproduce``: the paper's tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._checks import check_choice
from ..feature_maps import FeatureMaps
from .given_cache import CacheOption, read_cache
from .loading import check_machine, load_model, model_name
from .options import SHIPPED, DeviceOption, DtypeOption, LengthOption, ModelOption, check_out
from .quantized import (
    BitsOption,
    KeyBitsOption,
    TransformOption,
    TransformsOption,
    ValueBitsOption,
    read_codes,
)
from .telling import resumable, say, warn

TABLE_NAMES = "wikitext, pg19, c4, cnn, xsum, multinews, lm-eval"


def reproduce(
    context: typer.Context,
    table: Annotated[str, typer.Option(help=f"{TABLE_NAMES}.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a stopped run goes on there.")],
    model: ModelOption = SHIPPED,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            help="h2o=FOLDER, lambda=FOLDER, or of one share alone: h2o:10%=FOLDER. May be given "
            "more than once; without: no line for LESS, or the shipped model's own."
        ),
    ] = None,
    cache: CacheOption = None,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text file or folder, or .jsonl; default: the table's, by datasets."),
    ] = None,
    share: Annotated[
        list[str] | None, typer.Option(help="Of the positions; default: 2%, 5% and 10%.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="h2o or lambda; default: both.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents, articles or examples; default: all.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before an article; default: the paper's.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of a summary, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of summaries; 0: greedy.")] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Of summaries.")] = 42,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-eval, with commas; default: those of H2O's paper.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Of lm-eval: a folder of more tasks.")
    ] = None,
    length: LengthOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 1,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Measure a table of the paper, with its settings and its figures beside ours."""
    from ..evaluation import paper, paper_data
    from ..evaluation import reproduce as work
    from ..evaluation.summaries import check_can_judge

    # What needs no model is checked before one is loaded.
    given = read_cache(context, cache)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    check_choice("table", table, [*paper.TABLES])
    wanted = paper.TABLES[table]
    check_out(out)
    check_machine(device, dtype)
    for word in policy or ():
        check_choice("policy", word, paper.POLICIES)
    shares = tuple(parse_share(text) for text in share or ()) or paper.SHARES
    named = maps_by_share(maps or [])
    read: list[Any] | None = None
    if wanted.kind == "harness":
        from ..integrations import lm_eval  # noqa: F401
    elif wanted.kind == "summary":
        check_can_judge()
        read = [*paper_data.articles_of(wanted, data, limit, shots)]
    else:
        read = [*paper_data.texts_of(wanted, data, limit)]
    loaded, tokenizer = load_model(model, device, dtype)
    whole = None
    if given is not None:
        given.config_for(loaded)
        whole = {given.title: given.recipe}
    elif model == SHIPPED and maps is None:
        named = shipped_maps()
    if not named and whole is None:
        warn("maps: none are given, so there is no line for LESS")
    protocol = work.Protocol(
        shares=shares,
        policies=tuple(policy) if policy else paper.POLICIES,
        length=length,
        batch=batch,
        new_tokens=new_tokens,
        temperature=temperature,
        seed=seed,
        tasks=tuple(tasks.split(",")) if tasks else work.TASKS,
        include_path=include_path,
        limit=limit,
    )
    with resumable():
        lines = work.reproduce(
            loaded,
            tokenizer,
            wanted,
            read,
            protocol,
            named,
            out,
            named=model_name(model),
            whole=whole,
            quantization=codes.quantization,
            transforms=codes.transforms,
        )
    Console().print(as_table(lines, f"{table}: {model_name(model)}"))
    say(f"Written: {out / 'table.json'}, {out / 'table.md'}")


def parse_share(text: str) -> float:
    """A share from its spelling: 5%, or 0.05.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"share: got {text!r}, expected a share such as 5% or 0.05")
    return round(value, 6)


def maps_by_share(entries: list[str]) -> dict[tuple[str, float | None], FeatureMaps]:
    """Maps by policy and share, from ``h2o=FOLDER`` and ``h2o:10%=FOLDER``.

    Raises
    ------
    ValueError, FileNotFoundError
        If an entry is of another form, comes twice, or there are no such maps.
    """
    from ..evaluation.paper import POLICIES

    named: dict[tuple[str, float | None], FeatureMaps] = {}
    for entry in entries:
        form = re.fullmatch(r"(\w+)(?::([^=]+))?=(.+)", entry)
        if form is None or form[1] not in POLICIES:
            raise ValueError(
                f"maps: got {entry!r}, expected h2o=FOLDER, lambda=FOLDER or h2o:10%=FOLDER"
            )
        key = form[1], None if form[2] is None else parse_share(form[2])
        if key in named:
            raise ValueError(f"maps: got {entry!r}, but that policy and share came before")
        named[key] = FeatureMaps.from_pretrained(form[3])
    return named


def shipped_maps() -> dict[tuple[str, float | None], FeatureMaps]:
    """Those of the shipped model: trained at 5 %."""
    from ..reference_model.shipped_maps import shipped

    return {
        ("h2o", None): shipped("h2o", 0.05),
        ("lambda", None): shipped("sinkwindow", 0.05),
    }


def as_table(lines: Any, title: str) -> Table:
    """The lines for the terminal."""
    from ..evaluation.reproduce import figure, line_name, published_text, slots_told

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache")
    table.add_column("slots", justify="right")
    names = [*lines[0].values]
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("the paper's")
    for line in lines:
        cells = [line_name(line), slots_told(line)]
        cells += [figure(line.values[name]) for name in names]
        table.add_row(*map(Text, [*cells, published_text(line)]))
    return table
