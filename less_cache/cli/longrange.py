"""``less-cache longrange``: what perplexity hides of a small cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
)
from .options import (
    SHIPPED,
    CapacityOption,
    DeviceOption,
    DtypeOption,
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
from .telling import resumable, say, warn


def longrange(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the report; a stopped run goes on there.")],
    maps: Annotated[
        list[str] | None,
        typer.Option(help="FOLDER, or NAME=FOLDER, of maps; may be given more than once."),
    ] = None,
    cache: CacheOption = None,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = DEFAULT_POLICY,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    transform: TransformOption = None,
    transforms: TransformsOption = None,
    tasks: Annotated[
        str, typer.Option(help="passkey, multikey, variables and text, with commas.")
    ] = "passkey,multikey,variables,text",
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens, with commas; default: a quarter, half, nearly all positions."),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Where things hide, with commas; 0: the beginning.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, help="Of each length and depth.")] = 8,
    style: Annotated[
        str | None, typer.Option(help="prose or code; default: code for the shipped model.")
    ] = None,
    filler: Annotated[
        str | None,
        typer.Option(help="Text to hide things in; default: held-out code, or RULER's sentences."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="As for train; default: the shipped held-out modules.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Of real text, at most.")] = 16,
    window: Annotated[
        int | None, typer.Option(min=4, help="Tokens of one; default: the model's positions.")
    ] = None,
    short: Annotated[
        int | None, typer.Option(min=2, help="Of the short context; default: an eighth of that.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of names, numbers and filler.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Ask for hidden keys by length and depth, and read text that needs its far past."""
    from ..evaluation.comparison import contestants_for
    from ..evaluation.long_range import NEW_TOKENS, Plan, measure_long_range
    from ..evaluation.long_range_page import hidden_table, save_long_range, text_table
    from ..evaluation.needles import NOISE, STYLES
    from ..evaluation.report import check_can_draw
    from ..training.data import read_documents

    # What needs no model is checked before one is loaded.
    check_can_draw()
    whole = read_cache(context, cache)
    check_config(capacity, policy)
    codes = read_codes(bits, key_bits, value_bits, transform, transforms)
    check_out(out)
    check_machine(device, dtype)
    wanted = chosen("tasks", tasks, (*NEW_TOKENS, "text"))
    places = tuple(number("depths", text, float) for text in tasks_of(depths))
    if not all(0 <= depth <= 1 for depth in places):
        raise ValueError(f"depths: got {depths!r}, expected numbers from 0 to 1")
    sizes = tuple(number("lengths", text, int) for text in tasks_of(lengths or ""))
    style = style or ("code" if model == SHIPPED else "prose")
    chosen("style", style, STYLES)
    named = named_maps(maps or [])
    if whole is not None:
        named, codes = whole.maps, whole.codes
    documents: list[Any] = held_out() if data is None else read_documents(data)
    lines = [*NOISE]
    if filler is not None:
        lines = lines_of(read_documents(filler))
    elif style == "code":
        lines = lines_of(held_out())
    loaded, tokenizer = load_model(model, device, dtype)
    if whole is None:
        rank = next(iter(named.values())).rank if named else 0
        config = config_for(loaded, capacity, policy, rank, codes)
    else:
        config = whole.config_for(loaded)
    positions = length_for(config, window)
    most = max(NEW_TOKENS.get(task, 0) for task in wanted)
    if not sizes:
        sizes = (positions // 4, positions // 2, positions - most)
    if config.max_positions is not None and max(sizes) + most > config.max_positions:
        warn(f"lengths: {max(sizes)} and what follows is beyond the model's positions")
    plan = Plan(
        wanted,
        sizes,
        places,
        samples,
        style,
        seed,
        window=positions,
        windows=windows,
        short=short or max(2, positions // 8),
        batch=batch,
    )
    contestants = contestants_for(config, named, min(*sizes, positions), codes.transforms)
    with resumable():
        result = measure_long_range(
            loaded,
            tokenizer,
            contestants,
            plan,
            [(name, text) for name, text in documents if isinstance(text, str)],
            lines,
            out,
            named=model_name(model),
        )
    written = save_long_range(result, out)
    if result.cells:
        show("Hidden numbers and chains", *hidden_table(result))
    if result.text:
        show("Far context of real text, nats a token", *text_table(result))
    say("Written: " + ", ".join(map(str, written)))


def tasks_of(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def chosen(name: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known words, with commas between them.

    Raises
    ------
    ValueError
        If one is another, or there is none.
    """
    found = tuple(dict.fromkeys(tasks_of(text)))
    if not found or not set(found) <= set(known):
        raise ValueError(f"{name}: got {text!r}, expected some of {', '.join(known)}")
    return found


def number(name: str, text: str, kind: type[Any]) -> Any:
    """A number from its spelling.

    Raises
    ------
    ValueError
        If it is none, or a negative one.
    """
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{name}: got {text!r}, expected a number")
    return value


def lines_of(documents: list[Any]) -> list[str]:
    """The lines of documents, without empty ones."""
    return [
        line
        for _, text in documents
        if isinstance(text, str)
        for line in text.splitlines()
        if line.strip()
    ]


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
