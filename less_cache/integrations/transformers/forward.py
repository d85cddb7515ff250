"""Hooks on an attached model: they give it its cache, and check what comes in before it runs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...manager import CacheManager
from .cache import LessCache
from .falcon import falcon_mask
from .interface import LAYER
from .scoring import ScoringLayer

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""(module, args, kwargs) -> what they become."""


class FullAttentionWarning(UserWarning):
    """A pass was asked for logits that are the full cache's, not those of decoding with LessCache.

    The tokens of one pass see each other until its end, when the cache evicts.
    """


FULL_LOGITS = (
    "attach: a pass of more tokens than the cache holds (capacity = {capacity}) was asked for the "
    "logits of more than its last position. Those are the full cache's: what a pass brings is "
    "evicted at its end. attach(..., scoring=True) computes what decoding token by token would. "
    "This is said once"
)
NO_CACHE = (
    "attach: a pass with use_cache=False is the model without LessCache, and had more tokens than "
    "the cache would hold (capacity = {capacity}). attach(..., scoring=True) computes what "
    "decoding token by token would. This is said once"
)
CHECKPOINTED = (
    "model: transformers runs layers under gradient checkpointing without a cache, which LessCache "
    "is; {advice}, or call model.gradient_checkpointing_disable()"
)


class ModelHooks:
    """What happens before and after the forward of the decoder, and before that of its head.

    Parameters
    ----------
    decoder
        The model without its head.
    manager
        Config and maps of the caches.
    new_cache
        Makes the cache of a pass that was given none.
    alone
        Who attends in passes without a cache, where tokens are to attend as if they came one by
        one; ``None``: such passes are the model's own.
    """

    def __init__(
        self,
        decoder: Any,
        manager: CacheManager,
        new_cache: Callable[[], LessCache],
        alone: list[ScoringLayer] | None,
    ) -> None:
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.manager = manager
        self.new_cache = new_cache
        self.alone = alone
        self.layers = len(new_cache())
        self.is_falcon = decoder.config.model_type == "falcon"
        evicting = [x for x in manager.config.layers if x.policy.evicts]
        self.capacity = min((min(x.capacities) for x in evicting), default=None)
        # What there is to say if the pass under way is asked for all its logits.
        self._warning: str | None = None
        self._warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "model: less_cache is attached to it, and a copy would share its caches; detach it, "
            "copy or pickle it, and attach to the copy"
        )

    def before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the arguments, and put the cache among them."""
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if isinstance(cache, LessCache) and cache.in_step:
            cache.attended = 0
            return (), kwargs
        checkpointed = decoder.training and _checkpoints(decoder)
        if cache is None and self._goes_without(decoder, kwargs, checkpointed):
            self._before_alone(decoder, kwargs)
            return (), kwargs
        if checkpointed:
            advice = "attach with scoring=True, pass use_cache=False (the model without LessCache)"
            if self.alone is not None:
                advice = "leave out past_key_values"
            raise ValueError(CHECKPOINTED.format(advice=advice))
        if kwargs.get("output_attentions") or decoder.config.output_attentions:
            raise ValueError(
                "output_attentions: got True, but LessCache keeps no weights; expected False"
            )
        if cache is None:
            cache = self.new_cache()
            kwargs["use_cache"] = True
        self._check_cache(cache)
        inputs = _inputs_of(kwargs)
        if inputs is None:
            return (), kwargs
        batch, length = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        if not torch.compiler.is_compiling():
            _check_inputs(cache, mask, batch, length)
        if cache.follow_mask and mask is not None:
            _check_last_tokens(mask, length)
            positions = kwargs.get("position_ids")
            if positions is not None and positions.ndim == 2:
                # transformers counts on from the last column, whose position is 0 where it is
                # padding; the mask knows how many tokens there were.
                positions = mask.long().cumsum(1)[:, -length:] - 1
                kwargs["position_ids"] = positions.clamp_min(0)
        if self.alone is None and length > 1:
            self._warning = None
            if not cache.generating and self._evicts(cache.seen.value, mask, length):
                self._warning = FULL_LOGITS
        if self.is_falcon:
            kwargs["attention_mask"] = falcon_mask(mask, batch, length, inputs.device)
        kwargs["past_key_values"] = cache
        cache.scoring = self.alone is not None
        cache.attended = 0
        return (), kwargs

    def before_head(self, head: Any, args: tuple[Any, ...]) -> None:
        """Say, once, whose logits are asked for where they are not the cache's."""
        if args and args[0].ndim > 2 and args[0].shape[-2] > 1 and self._warning is not None:
            message, self._warning = self._warning, None
            self._warned = True
            _warn(message.format(capacity=self.capacity))

    def _goes_without(self, decoder: Any, kwargs: dict[str, Any], checkpointed: bool) -> bool:
        """Whether a pass that was given no cache gets none."""
        if self.alone is None:
            return kwargs.get("use_cache") is False
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", True)
        return checkpointed or not use_cache

    def _before_alone(self, decoder: Any, kwargs: dict[str, Any]) -> None:
        inputs, mask = _inputs_of(kwargs), kwargs.get("attention_mask")
        if inputs is None:
            return
        batch, length = inputs.shape[:2]
        if self.alone is None:
            # The model as it always was, gradients included.
            self._warning = None
            if not decoder.training and self._evicts(0, mask, length):
                self._warning = NO_CACHE
            return
        kwargs["use_cache"] = False
        _check_mask(mask, batch, length)
        if torch.compiler.is_compiling() and mask is None and kwargs.get("position_ids") is None:
            # Without a mask transformers asks of positions whether several sequences are packed,
            # which a graph can't tell.
            mask = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
            kwargs["attention_mask"] = mask
        if self.is_falcon:
            kwargs["attention_mask"] = falcon_mask(mask, batch, length, inputs.device)

    def _evicts(self, seen: Any, mask: Any, length: int) -> bool:
        """Whether a pass brings more than the cache has room for; not asked once that was said."""
        if self._warned or self.capacity is None or length == 1:
            return False
        if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.ndim != 2:
            return torch.compiler.is_compiling() or seen + length > self.capacity
        return seen + length > self.capacity and int(mask.sum(1).max()) > self.capacity

    def after(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See that all layers used the cache, and which token each row of a prompt ends in.

        Inside generate() the last column's logits choose the next token; where a prompt ends in
        padding they would be those of padding.
        """
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, LessCache):
            used = cache.attended == self.manager.config.num_layers
        else:
            used = self.alone is None or all(layer.used for layer in self.alone)
        if not used:
            raise RuntimeError(
                f"model: {decoder.config.model_type} is not supported: its attention did not use "
                "the cache it was given"
            )
        if not isinstance(cache, LessCache):
            return
        cache.attended = None
        if cache.in_step:
            # Counted by who replays the step.
            return
        cache.seen.advance(output.last_hidden_state.shape[1])
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
        if cache.manager is not self.manager:
            self._adopt(cache)
        if len(cache) != self.layers:
            raise ValueError(
                f"past_key_values: made for {len(cache)} layers, expected {self.layers}"
            )
        broken = bool(cache.attended)
        if not torch.compiler.is_compiling():
            seen = cache.seen.number
            broken |= any(x.get_seq_length() != seen for x in cache.sliding_layers.values())
        if broken:
            raise ValueError(
                "past_key_values: an earlier pass broke off between layers (reset() it, or load it "
                "from a snapshot), or is under way in another thread"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _adopt(self, cache: LessCache) -> None:
        """Take over a cache of an earlier attachment, or from a file, where it is of our kind."""
        mine, other = self.manager, cache.manager
        made_with = [
            tuple(part.digest if part else "" for part in (manager.maps, manager.transforms))
            for manager in (mine, other)
        ]
        if other.config != mine.config or made_with[0] != made_with[1]:
            raise ValueError(
                "past_key_values: made for another config, other maps or other transforms than "
                "those attached"
            )
        cache.manager = mine


def hand_on(alone: ScoringLayer | None) -> Hook:
    """A hook that gives an attention module who attends, to pass on.

    That is its layer of the cache, in place of a cache to update itself; in a pass without a cache
    it is `alone`, if anybody.
    """

    def before_attention(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, LessCache):
            kwargs = {**kwargs, "past_key_values": None, LAYER: cache.layers[module.layer_idx]}
        elif alone is not None:
            kwargs = {**kwargs, LAYER: alone}
        return args, kwargs

    return before_attention


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn(message: str) -> None:
    # While a graph is traced, this is called all the same.
    warnings.warn(message, FullAttentionWarning, stacklevel=2)


def _checkpoints(decoder: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in decoder.modules())


def _inputs_of(kwargs: dict[str, Any]) -> Tensor | None:
    ids: Tensor | None = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _check_inputs(cache: LessCache, mask: Any, batch: int, length: int) -> None:
    if cache.batch_size not in (-1, batch):
        raise ValueError(
            f"past_key_values: holds {cache.batch_size} sequences, but the input has {batch}; "
            "batch_repeat_interleave(n) makes room for n beams or returned sequences of each"
        )
    _check_mask(mask, batch, cache.seen.number + length)


def _check_mask(mask: Any, batch: int, total: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, total):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {found}, expected [batch, tokens seen + new] = {(batch, total)}"
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
