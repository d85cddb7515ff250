"""Decode steps of an attached model as CUDA graphs, made by a cache's first tokens."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import OptimizedModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...graphs import CapturedStep, check_capturable
from ...manager import CacheManager
from .cache import LessCache
from .forward import ModelHooks
from .model_check import model_device

KNOWN = ("input_ids", "attention_mask", "position_ids", "past_key_values")
"""Arguments of forward() that a captured step takes in."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "logits_to_keep": (0, 1),
}
"""Others, and the values at which they change nothing of a single token's logits."""

ON_THE_HOST = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies the host chooses by the sequence's length."""


def check_graph(model: Any, modules: list[Any], manager: CacheManager, scoring: bool) -> None:
    """Refuse a model whose decode steps no graph can be made of.

    Raises
    ------
    ValueError
        That says what stands against it.
    """
    check_capturable(manager, "model", model_device(modules))
    kind = model.config.model_type
    reason = None
    rope = {getattr(part, "rope_type", None) for part in model.modules() if _names_rope(part)}
    if scoring:
        reason = "scoring=True feeds tokens one by one, in Python"
    elif kind == "falcon":
        reason = "falcon makes its mask by the number of tokens seen"
    elif len(modules) != model.config.num_hidden_layers:
        reason = (
            f"{kind} has sliding-window layers, which transformers keeps, and counts their tokens "
            "in Python"
        )
    elif rope & set(ON_THE_HOST):
        reason = f"{kind} chooses the frequencies of its positions by the length, in Python"
    elif model.get_output_embeddings() is None:
        reason = f"{type(model).__name__} has no head that gives logits"
    if reason is not None:
        raise ValueError(f"cuda_graph: got True, but {reason}; expected False")


def check_not_compiled(model: Any) -> None:
    """Refuse a model that ``torch.compile`` made: it would never come to a graph of ours.

    Raises
    ------
    ValueError
        If it is one.
    """
    if isinstance(model, OptimizedModule):
        raise ValueError(
            "cuda_graph: got True, but the model is one of torch.compile's, whose mode "
            "'reduce-overhead' has graphs of its own; expected False, or the model uncompiled"
        )


def captured_forward(
    model: Any, decoder: Any, hooks: ModelHooks, manager: CacheManager
) -> Callable[..., Any]:
    """`model.forward`, of which passes of one token a sequence are captured and replayed.

    All others run as ever: prompts, passes with gradients, under autocast or while compiling, and
    those that ask for more than logits.
    """
    original = model.forward
    names = list(inspect.signature(original).parameters)
    own = object()

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if torch.compiler.is_compiling() or not _is_step(model, given):
            return original(*args, **kwargs)
        cache: LessCache = given["past_key_values"]
        _, checked = hooks.before(decoder, (), {n: given[n] for n in KNOWN if n in given})
        if cache.state is None:
            raise AssertionError("_is_step asks for a state")
        ids, mask = given["input_ids"], checked.get("attention_mask")
        positions = checked.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), cache.seen.number, device=ids.device)
        inputs: list[Tensor] = [ids, positions.expand(ids.shape)]
        if mask is not None:
            inputs.append(mask[:, -1:].to(torch.bool))
        key = (own, len(inputs))
        if key not in cache.steps:
            step = _step_of(original, weakref.ref(cache))
            cache.steps[key] = CapturedStep(manager, cache.state, step)
        logits = cache.steps[key](*inputs)
        cache.seen.advance(1)
        cache.attended = None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return forward


def _step_of(original: Callable[..., Any], held: weakref.ref[LessCache]) -> Callable[..., Tensor]:
    """A pass as a function of tensors alone."""

    def step(ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        cache = held()
        if cache is None:
            raise AssertionError("the cache holds its steps")
        cache.in_step = True
        try:
            output = original(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
        finally:
            cache.in_step = False
        logits: Tensor = output.logits
        return logits

    return step


def _is_step(model: Any, given: dict[str, Any]) -> bool:
    """Whether a pass is one token of each sequence, of which nothing but logits is wanted."""
    cache, ids = given.get("past_key_values"), given.get("input_ids")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not isinstance(cache, LessCache) or cache.state is None or cache.in_step:
        return False
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or model.training:
        return False
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        return False
    if positions is not None and (not isinstance(positions, Tensor) or positions.ndim != 2):
        return False
    settings = (model.config.output_hidden_states, model.config.output_attentions)
    others = {name: x for name, x in given.items() if name not in KNOWN and x is not None}
    return not any(settings) and all(
        isinstance(x, (bool, int)) and x in HARMLESS.get(name, ()) for name, x in others.items()
    )


def _names_rope(part: Any) -> bool:
    return isinstance(getattr(part, "rope_type", None), str)
