"""The command: ``python -m examples.serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import Service
from .model import SHIPPED, ServedModel, folder_with, shipped_folder
from .server import Server
from .settings import Settings

DEFAULT = Settings()


def main(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an export with its tokenizer; with --cache, folder or hub id of a "
            "transformers model. Default: the shipped model."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a whole cache for the model, which is exported with it on "
            "first use; reference:5%: one that ships."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="By which clients ask for it.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer. Default: the model's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of a decode step. Default: one a core but one.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = DEFAULT.max_batch,
    max_queue: Annotated[int, typer.Option(help="Prompts that may wait.")] = DEFAULT.max_queue,
    max_tokens: Annotated[int, typer.Option(help="Of one answer.")] = DEFAULT.max_tokens,
    max_choices: Annotated[int, typer.Option(help="n of a request.")] = DEFAULT.max_choices,
    prefill_chunk: Annotated[
        int, typer.Option(help="Prompt tokens between two steps.")
    ] = DEFAULT.prefill_chunk,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.")] = DEFAULT.max_body,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds from arrival to end.")
    ] = DEFAULT.request_timeout,
    shutdown_grace: Annotated[
        float, typer.Option(help="Seconds to finish after SIGTERM.")
    ] = DEFAULT.shutdown_grace,
    max_connections: Annotated[
        int, typer.Option(help="Open connections.")
    ] = DEFAULT.max_connections,
    api_key: Annotated[
        str | None, typer.Option(envvar="LESS_CACHE_API_KEY", help="Asked of clients.")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="A line on stdout for each request.")] = True,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that clients may use beside localhost and --host; '*': any."),
    ] = None,
) -> None:
    """Serve an exported model by the OpenAI API, with a page to try it at /."""
    settings = Settings(
        max_batch=max_batch,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_choices=min(max_choices, max_batch),
        prefill_chunk=prefill_chunk,
        max_body=max_body,
        request_timeout=request_timeout,
        shutdown_grace=shutdown_grace,
        max_connections=max_connections,
        api_key=api_key,
        allowed_hosts=(f"[{host}]" if ":" in host else host, *(allowed_host or ())),
    )
    if cache is not None:
        folder = folder_with(cache, model)
        name = name or (SHIPPED if model is None else model.name)
    elif model is None:
        folder, name = shipped_folder(), name or SHIPPED
    else:
        folder = model
    served = ServedModel(folder, name=name, context=context, threads=threads)
    service = Service(served, settings)
    Server(service, host, port, access_log=access_log).run()
    if service.scheduler.dead:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
