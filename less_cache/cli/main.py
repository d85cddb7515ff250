"""The commands under one name, and the entry point."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .evaluate import evaluate
from .export import export
from .info import info
from .lm_eval import PASSED_ON, lm_eval
from .longrange import longrange
from .reproduce import reproduce
from .telling import log_to_stderr, plain_errors
from .train import distill, merge, train
from .tune import tune

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(calibrate)
app.command()(train)
app.command()(distill)
app.command()(merge)
app.command()(tune)
app.command(name="eval")(evaluate)
app.add_typer(export, name="export")
app.command()(longrange)
app.command()(reproduce)
app.command(name="lm-eval", context_settings=PASSED_ON)(lm_eval)
app.command()(bench)
app.command()(info)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"less_cache {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell it and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell each step, with its time.")
    ] = False,
) -> None:
    """A KV cache of small and constant size that keeps most of what it forgets."""
    if verbose:
        log_to_stderr()


def main() -> None:
    """Entry point of ``less-cache``."""
    plain_errors(app)
