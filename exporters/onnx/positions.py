"""Rotary embeddings whose frequencies follow from the positions of the call, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHANGING = ("dynamic", "longrope")
"""The rules that take other frequencies when the longest row passes the original length."""


@contextlib.contextmanager
def stateless_positions(model: Any) -> Iterator[None]:
    """Let each call compute its rotary frequencies from its own positions, within the block.

    transformers writes the frequencies into the module when a longer row comes. A traced graph
    would keep those of the traced example for ever. Here they are a function of the call's largest
    position, which is what transformers arrives at when the positions of a sequence only grow.
    (After a longer sequence, its dynamic rule keeps the longer one's frequencies for the next one
    until that is shorter than the original length; here a sequence does not feel another.)

    Parameters
    ----------
    model
        A transformers model. Its modules are given back as they were.

    Raises
    ------
    ValueError
        If a module has such a rule, but computes it in a way of its own.
    """
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            rules = getattr(module, "rope_type", None)
            kinds = rules.values() if isinstance(rules, dict) else [rules]
            if any(isinstance(kind, str) and _changes(kind) for kind in kinds):
                module.forward = _stateless(module, model.config.model_type)
                undo.callback(module.__dict__.pop, "forward")
        yield


def _changes(kind: str) -> bool:
    return any(name in kind for name in CHANGING)


def _stateless(module: nn.Module, model_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a rotary embedding, without what it remembers between calls."""
    plain = _undecorated(module)
    if plain is None:
        raise ValueError(
            f"model: {model_type} cannot be exported: its {type(module).__name__} computes "
            f"{module.rope_type} positions in a way of its own"
        )
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    rules = {
        layer_type: _frequencies(module, str(kind), layer_type)
        for layer_type, kind in kinds.items()
        if _changes(str(kind))
    }

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        held: dict[str, Any] = {**vars(module), **module._buffers}
        if layer_type in rules:
            held[_named(layer_type, "inv_freq")] = rules[layer_type](position_ids.max() + 1)
        extra = {} if layer_type is None else {"layer_type": layer_type}
        # The original reads its own attributes only.
        with torch.no_grad():
            return plain(SimpleNamespace(**held), x, position_ids, **extra)

    return forward


def _frequencies(module: Any, kind: str, layer_type: str | None) -> Callable[[Tensor], Tensor]:
    """The frequencies by the tokens of the longest row, its new ones included."""
    config, initial = module.config, ROPE_INIT_FUNCTIONS[kind]
    short = getattr(module, _named(layer_type, "original_inv_freq"))
    if kind == "longrope":
        parameters = config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        limit = parameters["original_max_position_embeddings"]
        long = initial(config, short.device, seq_len=limit + 1, layer_type=layer_type)[0]
        return lambda tokens: torch.where(tokens > limit, long, short)
    limit = module.original_max_seq_len

    def dynamic(tokens: Tensor) -> Tensor:
        grown = initial(config, short.device, seq_len=tokens, layer_type=layer_type)[0]
        return torch.where(tokens > limit, grown, short)

    return dynamic


def _named(layer_type: str | None, name: str) -> str:
    return name if layer_type is None else f"{layer_type}_{name}"


def _undecorated(module: nn.Module) -> Callable[..., Any] | None:
    """The class's forward under transformers' `dynamic_rope_update`; ``None`` if it has none."""
    function: Any = type(module).forward
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        if function.__globals__ is vars(modeling_rope_utils):
            return inner  # type: ignore[no-any-return]
        function = inner
    return None
