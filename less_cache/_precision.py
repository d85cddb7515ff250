"""Autocast, which would round the sums that a cache keeps in float32."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def without_autocast(array: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which operators on `array`'s device have the dtypes of their inputs."""
    if not isinstance(array, Tensor) or not torch.amp.is_autocast_available(array.device.type):
        return _AS_IT_IS
    if not torch.is_autocast_enabled(array.device.type):
        return _AS_IT_IS
    return torch.autocast(array.device.type, enabled=False)
