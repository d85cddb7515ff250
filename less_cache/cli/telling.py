"""What the commands print, and how errors are told."""

from __future__ import annotations

import dis
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

OURS = ("less_cache", "exporters")
STOPPED = 130
"""Exit status of a process that Ctrl-C ended."""


def say(text: str) -> None:
    """Print a line as it is, whatever looks like markup in it, however long it is."""
    Console().print(Text(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a line to the error stream, marked as a warning."""
    _complain("warning", "bold yellow", text)


def _complain(kind: str, style: str, text: str) -> None:
    Console(stderr=True).print(Text.assemble((f"{kind}:", style), f" {text}"), soft_wrap=True)


class _BesideBars(logging.Handler):
    """Writes lines above progress bars rather than into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr() -> None:
    """Show what our loggers tell, from INFO on."""
    handler = _BesideBars()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)


def plain_errors(command: Callable[[], Any]) -> None:
    """Run a command; what a user did wrong is told in a line, anything else with a traceback."""
    try:
        command()
    except (ValueError, TypeError, ImportError, OSError) as error:
        if not is_told(error):
            raise
        _complain("error", "bold red", str(error))
        sys.exit(2)


def is_told(error: BaseException) -> bool:
    """Whether an error is one that a user can act on, so that its text is enough.

    That is what our own code raises on purpose, where it checks what it was given; and what the
    system says of a file. An error that came up by itself is a defect of ours.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    code = trace.tb_frame.f_code.co_code
    return package in OURS and dis.opname[code[trace.tb_lasti]] == "RAISE_VARARGS"


@contextmanager
def resumable() -> Iterator[None]:
    """Tell whoever stops what is in the block how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(STOPPED) from None
