"""Tasks that need nothing of each other, in this process or on the machines of a Ray cluster.

`run_tasks` gives the same results either way, in order. A task whose worker dies is started again;
one that keeps checkpoints where all machines see them goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ._checks import check_int, check_real

Result = TypeVar("Result")

LOCAL = "local"
"""The address of a cluster that is started here, and ends with the tasks."""


@dataclass(frozen=True)
class Ray:
    """A Ray cluster, and what a task takes of it.

    Parameters
    ----------
    address
        ``"local"``: one on this machine, which ends with the tasks; ``"auto"``: the one that
        runs here; or as ``ray.init`` takes it: ``"host:6379"``, ``"ray://host:10001"``.
    num_gpus, num_cpus
        That a task has to itself, or a share of one: 0.5.
    retries
        How often a task is started again when its worker dies.
    """

    address: str = LOCAL
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    retries: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address:
            raise ValueError(
                f"ray: got {self.address!r}, expected local, auto, or a cluster's address"
            )
        if self.num_gpus != 0:
            check_real("num_gpus", self.num_gpus, above=0.0)
        check_real("num_cpus", self.num_cpus, above=0.0)
        check_int("retries", self.retries, minimum=0)


def run_tasks(
    function: Callable[..., Result],
    tasks: Sequence[tuple[Any, ...]],
    *,
    shared: tuple[Any, ...] = (),
    on: Ray | None = None,
    told: str | None = None,
) -> list[Result]:
    """``[function(*shared, *task) for task in tasks]``, here or on a cluster.

    Parameters
    ----------
    function
        Of a module that the workers can import; it takes and gives what can be pickled. It may be
        run again from the beginning, so what it leaves behind must bear that.
    tasks
        The arguments of each call.
    shared
        Arguments that come first in all of them, and are sent once.
    on
        Where; ``None``: in this process, one after another.
    told
        What a bar that counts the results is called; ``None``: no bar.

    Returns
    -------
    list
        The results, in order. On CPUs they are the same bit for bit wherever they were computed,
        if the machines are of one kind: every worker computes with as many threads as this process.

    Raises
    ------
    ImportError
        If Ray is missing.
    Exception
        What the first task that failed raised. Others end with this process's connection.
    """
    if on is None:
        bar = tqdm(tasks, desc=told, disable=told is None)
        return [function(*shared, *task) for task in bar]
    with _cluster(on) as ray:
        remote = ray.remote(_call).options(
            num_cpus=on.num_cpus,
            num_gpus=on.num_gpus,
            max_retries=on.retries,
            name=getattr(function, "__name__", "task"),
        )
        sent = [ray.put(argument) for argument in (function, torch.get_num_threads(), *shared)]
        waiting = [remote.remote(len(sent), *sent, *task) for task in tasks]
        try:
            return [ray.get(task) for task in tqdm(waiting, desc=told, disable=told is None)]
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.WorkerCrashedError as error:
            raise RuntimeError(
                f"a task's worker died {on.retries + 1} times, the last time so: {error}"
            ) from None


def _call(count: int, *arguments: Any) -> Any:
    """What a worker runs: arguments that were sent once, `count` of them, come as values."""
    function, threads, *shared = arguments[:count]
    torch.set_num_threads(threads)
    return function(*shared, *arguments[count:])


@contextmanager
def _cluster(on: Ray) -> Iterator[Any]:
    """Ray, connected for as long as the block lasts, or as long as it was before."""
    try:
        import ray
    except ImportError:
        raise ImportError("ray: not installed: pip install less_cache[ray]") from None
    if ray.is_initialized():
        yield ray
        return
    where = None if on.address == LOCAL else on.address
    try:
        ray.init(address=where or "local", log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(f"ray: no cluster at {on.address!r}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
