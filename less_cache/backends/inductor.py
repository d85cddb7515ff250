"""The PyTorch backend for coded pairs on a CPU, with attention over them compiled by Inductor.

The first step of a layout compiles for some tens of seconds; PyTorch keeps what it compiled on
disk. All else is the backend ``torch``.
"""

from __future__ import annotations

import functools

from ..config import CacheConfig
from . import torch as eager
from .torch import eviction_times, prepare_maps
from .torch.compiled import attend_codes

__all__ = ["attend", "check_config", "eviction_times", "prepare_maps"]

attend = functools.partial(eager.attend, pairs=attend_codes)
"""The step; see `Backend.attend`."""


def check_config(config: CacheConfig) -> None:
    """Refuse what the backend ``torch`` does, and that for which there is nothing to compile.

    Raises
    ------
    ValueError
        If the backend ``torch`` refuses the config, pairs are stored as they are, or PyTorch finds
        no C++ compiler.
    """
    eager.check_config(config)
    for i, codes in enumerate(config.quantizations):
        if codes is None:
            raise ValueError(
                "backend: got 'inductor', which compiles attention over coded pairs, but "
                f"quantization is None in layer {i}; expected 'torch'"
            )
    _check_compiler()


@functools.cache
def _check_compiler() -> None:
    # Found when it is used: it takes a while to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "backend: got 'inductor', which needs a C++ compiler, and PyTorch finds none "
            f"(the variable CXX may name one): {error}; expected 'torch'"
        ) from None
