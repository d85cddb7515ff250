"""Hooks on an attached model: they give it its cache, and check what comes in before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import LessCache
from .falcon import falcon_mask
from .interface import LAYER


class ModelHooks:
    """What happens before and after the decoder's forward.

    Parameters
    ----------
    decoder
        The model without its head.
    new_cache
        Makes the cache of a pass that was given none.
    """

    def __init__(self, decoder: Any, new_cache: Callable[[], LessCache]) -> None:
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.new_cache = new_cache
        self.reference = new_cache()
        self.is_falcon = decoder.config.model_type == "falcon"

    def before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the arguments, and put the cache among them."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if cache is None and kwargs.get("use_cache") is False:
            # Without a cache this is the model as it always was, gradients included.
            return (), kwargs
        if kwargs.get("output_attentions") or decoder.config.output_attentions:
            raise ValueError(
                "output_attentions: got True, but LessCache keeps no weights; expected False"
            )
        if cache is None:
            cache = self.new_cache()
            kwargs["use_cache"] = True
        self._check_cache(cache)
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return (), kwargs
        batch, length = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        _check_inputs(cache, mask, batch, length)
        if cache.follow_mask and mask is not None:
            _check_last_tokens(mask, length)
            positions = kwargs.get("position_ids")
            if positions is not None and positions.ndim == 2:
                # transformers counts on from the last column, whose position is 0 where it is
                # padding; the mask knows how many tokens there were.
                positions = mask.long().cumsum(1)[:, -length:] - 1
                kwargs["position_ids"] = positions.clamp_min(0)
        if self.is_falcon:
            mask = falcon_mask(mask, batch, cache.get_seq_length() + length, inputs.device)
            kwargs["attention_mask"] = mask
        kwargs["past_key_values"] = cache
        cache.expected = cache.get_seq_length() + length
        return (), kwargs

    def after(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See that all layers used the cache, and which token each row of a prompt ends in.

        Inside generate() the last column's logits choose the next token; where a prompt ends in
        padding they would be those of padding.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if not isinstance(cache, LessCache):
            return
        if any(layer.seen != cache.expected for layer in cache.less_layers):
            raise RuntimeError(
                f"model: {decoder.config.model_type} is not supported: its attention did not use "
                "the cache it was given"
            )
        if not cache.follow_mask or mask is None:
            return
        hidden = output.last_hidden_state
        length = hidden.shape[1]
        if length == 1:
            return
        new = mask.flatten(1)[:, -length:].to(torch.bool)
        columns = torch.arange(length, device=new.device)
        last = torch.where(new, columns, -1).amax(1)
        last = last.where(last >= 0, length - 1).to(hidden.device)
        rows = torch.arange(len(last), device=hidden.device)
        output.last_hidden_state = torch.cat([hidden[:, :-1], hidden[rows, last].unsqueeze(1)], 1)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, LessCache):
            raise TypeError(
                f"past_key_values: got {type(cache).__name__}, expected a LessCache from the "
                "new_cache() of what less_cache.attach returned"
            )
        mine = self.reference.manager
        if cache.manager.config != mine.config or cache.manager.maps is not mine.maps:
            raise ValueError(
                "past_key_values: made for another config or other maps than those attached"
            )
        seen = cache.get_seq_length()
        if any(cache.get_seq_length(i) != seen for i in range(len(cache))):
            raise ValueError(
                "past_key_values: an earlier pass broke off between layers; reset() it, or load it "
                "from a snapshot"
            )
        if len(cache) != len(self.reference):
            raise ValueError(
                f"past_key_values: made for {len(cache)} layers, expected {len(self.reference)}"
            )


def before_attention(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give an attention module its layer's cache to pass on, in place of one to update itself."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, LessCache):
        kwargs = {**kwargs, "past_key_values": None, LAYER: cache.layers[module.layer_idx]}
    return args, kwargs


def _check_inputs(cache: LessCache, mask: Any, batch: int, length: int) -> None:
    if cache.batch_size not in (-1, batch):
        raise ValueError(
            f"past_key_values: holds {cache.batch_size} sequences, but the input has {batch}; "
            "batch_repeat_interleave(n) makes room for n beams or returned sequences of each"
        )
    if mask is None:
        return
    seen = cache.get_seq_length()
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, seen + length):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {found}, expected [batch, tokens seen + new] = "
            f"{(batch, seen + length)}"
        )


def _check_last_tokens(mask: Tensor, length: int) -> None:
    """Refuse a chunk of a prompt in which a row that has begun has nothing but padding."""
    if 1 < length < mask.shape[1]:
        idle = mask[:, :-length].any(1) & ~mask[:, -length:].any(1)
        if bool(idle.any()):
            raise ValueError(
                f"attention_mask: row(s) {idle.nonzero().flatten().tolist()} have no token among "
                f"the last {length} columns, so nothing says how they go on; pad on the left"
            )
