"""A driver for Triton where there is no GPU: kernels are compiled and found, and not launched."""

from __future__ import annotations

import types
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from less_cache.backends import triton as backend
from less_cache.backends.triton import launch

CAPABILITY = 90
SHARED_BYTES = 227 * 1024
"""Of an H200, and what one of its programs may take."""


class StandIn:
    """What Triton asks of a driver; a launch costs what it costs to call it.

    Attributes
    ----------
    launched : int
        How many kernels were.
    """

    def __init__(self) -> None:
        self.launched = 0
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
            load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Whom kernels are compiled for."""
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")

    def launcher_cls(self, *_: Any) -> Any:
        """Makes what is called to launch a kernel."""

        def launched(*_: Any) -> None:
            self.launched += 1

        return launched


def use_stand_in() -> StandIn:
    """Let the backend ``triton`` take tensors of the CPU, for the rest of this process.

    Raises
    ------
    RuntimeError
        If it runs under the interpreter, which launches in another way.
    """
    if launch.INTERPRETED:
        raise RuntimeError("triton: runs under its interpreter; unset TRITON_INTERPRET")
    stand_in = StandIn()
    driver.set_active(stand_in)
    backend.check_device = lambda array: None
    return stand_in
