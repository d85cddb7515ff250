"""generate() of an attached model: a `LessCache` by itself, and no decoding that needs rollback."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .cache import ROLLBACK, LessCache

NEEDS_ROLLBACK = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
)
"""Arguments that ask for assisted, speculative or contrastive decoding."""

NOT_OURS = ("cache_implementation", "output_attentions", "custom_generate")
"""Arguments that must be left alone, since they choose another cache or need one."""


def wrap_generate(model: Any, new_cache: Callable[[], LessCache]) -> Callable[..., Any]:
    """`model.generate` with a cache of its own for each call that brings none.

    Parameters
    ----------
    model
        With a method generate().
    new_cache
        Makes the cache.
    """
    original = model.generate
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        settings = given.get("generation_config") or model.generation_config
        asked = {**given, **given.get("kwargs", {})}

        def value(name: str) -> Any:
            return asked[name] if name in asked else getattr(settings, name, None)

        for name in NEEDS_ROLLBACK:
            if value(name):
                raise NotImplementedError(ROLLBACK.format(name=name))
        for name in NOT_OURS:
            if value(name):
                raise ValueError(
                    f"{name}: got {value(name)!r}, which a model with LessCache attached does not "
                    "take; leave it out"
                )
        if value("use_cache") is False:
            raise ValueError("use_cache: got False, but LessCache is attached; leave it out")
        cache = asked.get("past_key_values")
        if cache is None:
            cache = kwargs["past_key_values"] = new_cache()
        if not isinstance(cache, LessCache):
            raise TypeError(f"past_key_values: got {type(cache).__name__}, expected a LessCache")
        _check_coverage(cache, given, asked)
        cache.generating = True
        cache.follow_mask = asked.get("position_ids") is None
        try:
            return original(*args, **kwargs)
        finally:
            cache.generating = cache.follow_mask = False

    return generate


def _check_coverage(cache: LessCache, given: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse a second turn whose length says that it begins in the middle of the first."""
    inputs = given.get("inputs")
    inputs = asked.get("input_ids") if inputs is None else inputs
    mask = asked.get("attention_mask")
    covered = inputs if mask is None else mask
    seen = cache.get_seq_length()
    if seen and covered is not None and covered.shape[1] <= seen:
        # transformers would take the difference for the number of new tokens.
        raise ValueError(
            f"attention_mask: covers {covered.shape[1]} tokens, but the cache has seen {seen}; "
            "it must cover those and the new ones"
        )
