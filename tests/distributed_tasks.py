"""Tasks that worker processes import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch


def add(offset: int, number: int) -> tuple[int, int, int]:
    """The sum, who made it, and with how many threads."""
    return offset + number, os.getpid(), torch.get_num_threads()


def add_at_the_second_try(folder: str, number: int) -> int:
    """The first time, the process is killed as the system kills one."""
    mark = Path(folder) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number + 1


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(number: int) -> int:
    if number == 1:
        raise ValueError("number: got 1, expected another")
    return number
