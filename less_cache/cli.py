"""The command line: ``less-cache demo | train | distill | merge | eval | export | bench | ...``."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from .cli_bench import bench
from .cli_export import export

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A KV cache of small and constant size that keeps most of what it forgets.",
)
app.add_typer(export, name="export")
app.command()(bench)
console = Console()

SHIPPED = "reference"
"""The name by which the model that ships with the package is asked for."""

ModelOption = Annotated[
    str, typer.Option(help=f"Folder or hub id of the model, or '{SHIPPED}': the shipped one.")
]
DataOption = Annotated[
    str, typer.Option(help="Text file or folder, datasets:NAME[:CONFIG[:SPLIT]], or .npy of ids.")
]
CapacityOption = Annotated[
    str, typer.Option(help="Slots a head (52), or a share of the model's positions (0.05, 5%).")
]
PolicyOption = Annotated[
    str, typer.Option(help="h2o, sinkwindow, tova, ... with fields: sinkwindow:sinks=4,recent=16.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="Of the model: float32, float16 or bfloat16.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
) -> None:
    """Run the main job on the shipped model, and write a report to look at."""
    from .evaluation.demo import run_demo, write_demo
    from .evaluation.report import as_table

    result = run_demo()
    page = write_demo(result, out)
    console.print(as_table(result.comparison, "Held-out modules of the standard library"))
    table = Table(title=f"Continuing {result.document}", title_justify="left")
    for column in ("cache", "bytes", "tokens/s", "first tokens as under the full cache"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for item in result.continuations:
        table.add_row(
            item.name,
            f"{item.bytes_per_sequence:,}",
            f"{item.tokens_per_second:.0f}",
            str(item.agreed),
        )
    console.print(table)
    console.print(f"Report: {page}")
    console.print("Next: less-cache eval --help (your model and text), less-cache train --help")


@app.command()
def train(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")],
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = "h2o",
    rank: Annotated[int, typer.Option(help="Rows of the low-rank state.")] = 8,
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
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; default: all.")] = None,
    sequences: Annotated[int | None, typer.Option(help="How many; default: all there are.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these: 0:8, or 3.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences a forward pass when collecting.")] = 4,
    data_on_disk: Annotated[bool, typer.Option(help="Keep a layer's data in files.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit feature maps to a model, layer by layer."""
    import dataclasses

    from .training import RECIPES, load_tokens
    from .training import train as run

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
    loaded, tokenizer = _load_model(model, device, dtype)
    config = _config(loaded, capacity, policy, rank)
    tokens = load_tokens(
        data,
        tokenizer,
        length=length or loaded.config.max_position_embeddings,
        vocabulary=loaded.config.vocab_size,
        sequences=sequences,
    )
    maps = run(
        loaded,
        tokens,
        config,
        chosen,
        out,
        layers=_layers(layers, config.num_layers),
        data_on_disk=data_on_disk,
        batch=batch,
        model_id=model,
    )
    if maps is None:
        console.print(
            f"Layers done; the others are still missing. Then: less-cache merge {out} ..."
        )
    else:
        _print_errors(maps.record["validation_error_share"])
        console.print(f"Maps: {out}. Next: less-cache eval --maps LESS={out} ...")


@app.command()
def distill(
    data: DataOption,
    maps: Annotated[Path, typer.Option(help="Folder of the per-layer maps to start from.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")],
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = "h2o",
    steps: Annotated[int, typer.Option(help="Steps of Adam.")] = 400,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 1e-3,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; default: all.")] = None,
    sequences: Annotated[int | None, typer.Option(help="How many; default: all there are.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    micro_batch: Annotated[int, typer.Option(help="Sequences at a time; more take memory.")] = 1,
    recompute: Annotated[bool, typer.Option(help="Spend time to save memory.")] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit all layers' maps together, to the model's logits under the full cache."""
    from .feature_maps import FeatureMaps
    from .training import DistillRecipe, load_tokens
    from .training import distill as run

    start = FeatureMaps.from_pretrained(maps)
    loaded, tokenizer = _load_model(model, device, dtype)
    config = _config(loaded, capacity, policy, start[0].rank)
    tokens = load_tokens(
        data,
        tokenizer,
        length=length or loaded.config.max_position_embeddings,
        vocabulary=loaded.config.vocab_size,
        sequences=sequences,
    )
    recipe = DistillRecipe(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        seed=seed,
        micro_batch=micro_batch,
        recompute=recompute,
    )
    fitted = run(loaded, tokens, config, start, recipe, out)
    console.print(f"Validation loss: {fitted.record['validation_loss']:.4f} nats a token")
    console.print(f"Maps: {out}. Next: less-cache eval --maps LESS={out} ...")


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs that share settings.")],
    out: Annotated[Path, typer.Option(help="Where the maps are written.")],
) -> None:
    """Put layers that were fitted in several runs together."""
    from .training import merge as run

    maps = run(folders, out)
    _print_errors(maps.record["validation_error_share"])
    console.print(f"Maps: {out}")


@app.command(name="eval")
def evaluate(
    maps: Annotated[
        list[str], typer.Option(help="NAME=FOLDER of maps; may be given more than once.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    data: Annotated[
        str | None, typer.Option(help="As for train; default: the shipped held-out modules.")
    ] = None,
    model: ModelOption = SHIPPED,
    capacity: CapacityOption = "0.05",
    policy: PolicyOption = "h2o",
    length: Annotated[int | None, typer.Option(help="Tokens a window; default: all.")] = None,
    windows: Annotated[int | None, typer.Option(help="At most this many.")] = None,
    prompts: Annotated[int, typer.Option(help="Continuations to compare; 0: none.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Their length.")] = 64,
    batch: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Judge maps on held-out text: perplexity, gap recovered, agreement of continuations."""
    import torch

    from .evaluation.comparison import compare
    from .evaluation.perplexity import cut_windows
    from .evaluation.report import as_table, save_report
    from .training.data import read_documents, tokenize

    named = _named_maps(maps)
    loaded, tokenizer = _load_model(model, device, dtype)
    config = _config(loaded, capacity, policy, next(iter(named.values()))[0].rank)
    if data is None:
        from .reference_model import held_out_documents

        documents = [(d.name, d.text) for d in held_out_documents()]
    else:
        documents = read_documents(data)
    size = length or loaded.config.max_position_embeddings
    cut = cut_windows(tokenize(documents, tokenizer), size)
    if windows is not None:
        cut = cut[:: max(1, len(cut) // windows)][:windows]
    starts = None
    if prompts:
        chosen = cut[:: max(1, len(cut) // prompts)][:prompts]
        starts = torch.stack([window.ids[: size - new_tokens] for window in chosen])
    title = f"{model}: {policy} at {capacity}"
    comparison = compare(
        loaded, cut, config, named, prompts=starts, new_tokens=new_tokens, batch=batch
    )
    save_report(comparison, out, title)
    console.print(as_table(comparison, title))
    console.print(f"Report: {out}")


@app.command()
def info(
    maps: Annotated[Path | None, typer.Option(help="Describe this folder of maps.")] = None,
) -> None:
    """Tell what this machine can run, and what a folder of maps holds."""
    import importlib.util

    import torch

    from . import __version__
    from .backends import MODULES
    from .feature_maps import FeatureMaps

    table = Table(show_header=False, box=None)
    table.add_row("less_cache", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()}")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", ", ".join(gpus) or "none")
    table.add_row("backends", ", ".join(MODULES))
    optional = ("transformers", "triton", "onnxruntime", "tensorrt", "datasets", "matplotlib")
    found = [name for name in optional if importlib.util.find_spec(name)]
    table.add_row("optional packages", ", ".join(found) or "none")
    if maps is not None:
        read = FeatureMaps.from_pretrained(maps)
        table.add_row("maps", repr(read))
        table.add_row("for the model", str(read.model_id))
        table.add_row("method", str(read.record.get("method", "unknown")))
        table.add_row("digest", read.digest)
    console.print(table)


def _load_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from .dtypes import dtype_name

    kind = getattr(torch, dtype_name(dtype))
    if name == SHIPPED:
        from .reference_model import load

        model: Any
        tokenizer: Any
        model, tokenizer = load(dtype=kind)
        return model.to(device), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        # Enough for token ids; whoever needs it for text says so.
        tokenizer = None
    return loaded.train(False).to(device), tokenizer


def _config(model: Any, capacity: str, policy: str, rank: int) -> Any:
    from .config import CacheConfig
    from .policies import parse_policy

    return CacheConfig.from_model(
        model.config,
        capacity=_capacity(capacity),
        policy=parse_policy(policy),
        rank=rank,
        dtype=model.dtype,
    )


def _capacity(text: str) -> int | float:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(
            f"capacity: got {text!r}, expected slots (52) or a share (0.05, 5%)"
        ) from None


def _layers(text: str | None, num_layers: int) -> range | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    try:
        start = int(first or 0)
        stop = start + 1 if ":" not in text else int(last or num_layers)
    except ValueError:
        raise ValueError(f"layers: got {text!r}, expected 3, or 0:8") from None
    if not 0 <= start < stop <= num_layers:
        raise ValueError(f"layers: got {text!r}, expected a part of 0:{num_layers}")
    return range(start, stop)


def _named_maps(entries: list[str]) -> dict[str, Any]:
    from .feature_maps import FeatureMaps

    named = {}
    for entry in entries:
        name, separator, folder = entry.partition("=")
        if not separator or not name or name in named:
            raise ValueError(f"maps: got {entry!r}, expected NAME=FOLDER, each name once")
        named[name] = FeatureMaps.from_pretrained(folder)
    return named


def _print_errors(shares: list[float | None]) -> None:
    table = Table(title="Validation error, as a share of the policy's own", title_justify="left")
    for layer in range(len(shares)):
        table.add_column(str(layer), justify="right")
    table.add_row(*("?" if share is None else f"{share:.2f}" for share in shares))
    console.print(table)


Result = TypeVar("Result")


def _plain_errors(command: Callable[[], Result]) -> Result:
    """Run a command; what a user did wrong is told in a line, without a traceback."""
    try:
        return command()
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, markup=True)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from the last checkpoint.")
        sys.exit(130)


def main() -> None:
    """Entry point of ``less-cache``."""
    _plain_errors(app)


if __name__ == "__main__":
    main()
