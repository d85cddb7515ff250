"""The PyTorch backend for coded pairs on a CPU, with attention over them compiled by Inductor.

The first step of a layout compiles for some tens of seconds; PyTorch keeps what it compiled on
disk. All else is the backend ``torch``, layers whose pairs are stored as they are included.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ..config import CacheConfig
from ..layer_config import LayerConfig
from . import torch as eager
from .torch import eviction_times, prepare_maps
from .torch.attended import Attended
from .torch.compiled import attend_codes
from .torch.pairs import attend_by_run, attend_pairs
from .torch.slots import RunSlots

__all__ = ["attend", "check_config", "eviction_times", "prepare_maps"]


def _attend_slots(
    layer: LayerConfig,
    slots: RunSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    with_mass: bool,
) -> Attended:
    given = (slots, q, k, v, slot, with_mass)
    if layer.quantization is None:
        return attend_pairs(layer, *given)
    return attend_by_run(attend_codes, *given) if slots.runs else attend_codes(layer, *given)


attend = functools.partial(eager.attend, pairs=_attend_slots)
"""The step; see `Backend.attend`."""


def check_config(config: CacheConfig) -> None:
    """Refuse what the backend ``torch`` does, and that for which there is nothing to compile.

    Raises
    ------
    ValueError
        If the backend ``torch`` refuses the config, all pairs are stored as they are, or PyTorch
        finds no C++ compiler.
    """
    eager.check_config(config)
    if not config.has_codes:
        raise ValueError(
            "backend: got 'inductor', which compiles attention over coded pairs, but quantization "
            "is None; expected 'torch'"
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
