"""The options of commands whose tasks may run on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from ..distributed import Ray

RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Spread the work over a Ray cluster: local starts one here, auto finds one here, or "
        "HOST:PORT.",
    ),
]
GpusOption = Annotated[
    float, typer.Option(min=0, help="Of a task, on a cluster; a share of one will do: 0.5.")
]
RetriesOption = Annotated[
    int, typer.Option(min=0, help="How often a task begins again when its worker dies.")
]


def cluster(ray: str | None, gpus: float, retries: int, device: str) -> Ray | None:
    """What the options say; ``None``: this process.

    Raises
    ------
    ValueError
        If they contradict each other.
    """
    if ray is None:
        if gpus:
            raise ValueError(f"gpus: got {gpus:g} without --ray, but this process has what it has")
        return None
    if device.startswith("cuda") and not gpus:
        raise ValueError(f"gpus: got 0, but --device {device} needs some of a worker's: --gpus 1")
    return Ray(ray, num_gpus=gpus, retries=retries)
