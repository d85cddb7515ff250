"""`LessCache`: a less_cache state in the shape of a transformers `Cache`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ..._checks import check_int, check_path, check_rows
from ...config import CacheConfig
from ...graphs import CapturedStep
from ...manager import CacheManager
from ...scoring import attend_one_by_one
from ...state import CacheState
from ..introspection import full_attention_layers
from .counting import TokensSeen
from .saving import load_cache, save_cache

ROLLBACK = (
    "{name}: not supported by LessCache, which cannot take tokens back: what it evicted is merged "
    "into a low-rank state. Decode without an assistant, prompt lookup or contrastive search"
)


class LessLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer's view of a `LessCache`."""

    is_sliding = False

    def __init__(self, cache: LessCache, index: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index

    @property
    def config(self) -> CacheConfig:
        """Of the cache this layer belongs to."""
        return self.cache.manager.config

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # After rope under autocast keys may be wider than values, which have the model's dtype.
        self.cache.allocate(
            value_states.shape[0], dtype=value_states.dtype, device=value_states.device
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # An attached model never comes here; any other would attend to the new tokens alone.
        raise RuntimeError(
            "past_key_values: a LessCache works only in a model that less_cache.attach was called "
            "on, and not detached from since"
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from new tokens and take them in.

        Parameters
        ----------
        q
            [B, Hq, S, D], after the rotary embedding.
        k, v
            [B, Hkv, S, D].
        mask
            [B, S] booleans, false at padding; ``None``: no padding.

        Returns
        -------
        Tensor
            [B, Hq, S, D], of q's dtype.
        """
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        cache = self.cache
        if cache.state is None:
            raise AssertionError("lazy_initialization makes the state")
        dtype = getattr(torch, cache.state.config.dtype)
        inputs = (q.to(dtype), k.to(dtype), v.to(dtype), mask)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if cache.scoring and (learns or k.shape[2] > 1):
            out = attend_one_by_one(cache.manager, cache.state, self.index, *inputs).to(q.dtype)
        else:
            with torch.no_grad():
                out = cache.manager.attend(cache.state, self.index, *inputs).to(q.dtype)
            if learns:
                out = _NoBackward.apply(out, q, k, v)
        # Counted only once nothing can fail any more.
        if cache.attended is not None:
            cache.attended += 1
        return out

    def get_seq_length(self) -> int:
        return self.cache.seen.value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen.value + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        # The cache resets what all its layers share.
        pass


class _NoBackward(torch.autograd.Function):
    """Keeps a backward pass from silently leaving the attention out of the gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            "backward: LessCache has no gradients; attach with scoring=True, which has, train with "
            "use_cache=False, which is the model without it, or detach first"
        )


class LessCache(Cache):  # type: ignore[misc]
    """The cache that an attached model reads and writes; what ``past_key_values`` is.

    `Attachment.new_cache` makes one. Full-attention layers are kept in `state`, whose size is
    constant; sliding-window layers keep transformers' own sliding cache.

    Parameters
    ----------
    manager
        Config, maps and backend.
    model_config
        The transformers model's configuration.
    batch_size
        Sequences. Default: those of the first forward pass, which then allocates.

    Attributes
    ----------
    state : CacheState or None
        ``None`` until it is allocated.

    Raises
    ------
    ValueError
        If the model has another number of full-attention layers than the manager's config.
    """

    def __init__(
        self, manager: CacheManager, model_config: Any, *, batch_size: int | None = None
    ) -> None:
        text = model_config.get_text_config(decoder=True)
        full = full_attention_layers(text)
        if len(full) != manager.config.num_layers:
            raise ValueError(
                f"manager: its config has num_layers = {manager.config.num_layers}, but the model "
                f"has {len(full)} full-attention layers"
            )
        if batch_size is not None:
            check_int("batch_size", batch_size, minimum=1)
        layers = DynamicCache(config=text).layers
        for index, i in enumerate(full):
            layers[i] = LessLayer(self, index)
        super().__init__(layers=layers)
        self.manager = manager
        self.model_config = model_config
        self.state: CacheState | None = None
        self.seen = TokensSeen()
        """Padding included."""
        self.attended: int | None = None
        """How many layers have taken in the tokens of the pass that is under way, if one is."""
        self.scoring = False
        """Whether tokens of one pass attend as if they came one by one."""
        self.generating = False
        """Whether generate() runs."""
        self.follow_mask = False
        """Whether positions come from the attention mask: inside generate(), where padding may
        stand to the right of a prompt."""
        self.steps: dict[Any, CapturedStep] = {}
        """Steps over the state that were captured as graphs."""
        self.in_step = False
        """Whether a pass of such a step runs: what comes in was checked, and its mask is that of
        the new token alone."""
        self._batch_size = batch_size

    def __deepcopy__(self, memo: dict[int, Any]) -> LessCache:
        return self.clone()

    def clone(self) -> LessCache:
        """A copy that goes on by itself, such as one for each continuation of a prompt.

        ``copy.deepcopy(cache)`` is the same. Config and maps are shared, tokens are not.

        Raises
        ------
        RuntimeError
            If a pass is under way, or broke off between layers.
        """
        if self.attended:
            raise RuntimeError("cache: a pass is under way, or broke off between layers")
        other = LessCache(self.manager, self.model_config, batch_size=self._batch_size)
        other.seen.set(self.seen.number)
        other.scoring = self.scoring
        for i, layer in self.sliding_layers.items():
            other.layers[i] = copy.deepcopy(layer)
        if self.state is not None:
            other.adopt(self.state.clone())
        return other

    @property
    def less_layers(self) -> list[LessLayer]:
        """The full-attention layers."""
        return [layer for layer in self.layers if isinstance(layer, LessLayer)]

    @property
    def sliding_layers(self) -> dict[int, Any]:
        """The other layers, by index in the model."""
        return {i: x for i, x in enumerate(self.layers) if not isinstance(x, LessLayer)}

    @property
    def batch_size(self) -> int:
        """B, or -1 while it is open."""
        return -1 if self._batch_size is None else self._batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the sliding-window layers; 0 before the first tokens."""
        sliding = [x for layer in self.sliding_layers.values() for x in (layer.keys, layer.values)]
        own = 0 if self.state is None else self.state.nbytes
        return own + sum(x.nbytes for x in sliding if x is not None)

    def allocate(self, batch_size: int, *, dtype: torch.dtype, device: Any) -> None:
        """Make the state, where there is none yet, for `batch_size` sequences.

        Raises
        ------
        ValueError
            If the cache was made for another batch size.
        """
        if self.batch_size not in (-1, batch_size):
            raise ValueError(
                f"batch_size: got {batch_size}, but the cache holds {self.batch_size} sequences"
            )
        if self.state is None:
            self.adopt(self.manager.init(batch_size, device=device, dtype=dtype))

    def adopt(self, state: CacheState) -> None:
        """Go on with another state of the same config."""
        if state is not self.state:
            # They are at the addresses of the other state's arrays.
            self.steps = {}
        self.state = state
        self.seen.place(state.layers[0].keys.device)
        self._batch_size = state.batch_size
        for layer in self.less_layers:
            layer.is_initialized = True

    def reset(self) -> None:
        """Forget everything; what is allocated stays so, but for sliding windows."""
        for layer in self.sliding_layers.values():
            # They grow by concatenation; transformers 5.17 would leave zeros to grow from.
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        self.seen.set(0)
        self.attended = None
        if self.state is not None:
            self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, [B] integers."""
        if self.state is not None:
            self.state.reorder(beam_idx)
        for layer in self.sliding_layers.values():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in succession, in place of the batch there was."""
        check_int("repeats", repeats, minimum=1)
        if self.state is not None:
            self.adopt(self.state.repeat(repeats))
        elif self._batch_size is not None:
            self._batch_size *= repeats
        for layer in self.sliding_layers.values():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by `indices`: integers, or one boolean a row."""
        if isinstance(indices, Tensor) and indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        if self._batch_size is not None:
            rows = check_rows("indices", indices, self._batch_size)
            indices = torch.as_tensor(rows.astype("int64"))
        if self.state is not None:
            self.adopt(self.state.select(indices))
        elif self._batch_size is not None:
            self._batch_size = len(indices)
        for layer in self.sliding_layers.values():
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported.

        Raises
        ------
        NotImplementedError
            Always: evicted pairs do not come back.
        """
        raise NotImplementedError(ROLLBACK.format(name="crop"))

    def activate_past_recording(self) -> None:
        """Not supported, as `crop` is not.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(ROLLBACK.format(name="activate_past_recording"))

    def save(self, folder: str | Path) -> None:
        """Write the cache into a folder; `Attachment.load_cache` reads it back.

        Whoever reads meanwhile, or after a crash, finds the cache that was there or this one.

        Parameters
        ----------
        folder
            Made if need be. ``state.safetensors`` in it is `CacheState.save`'s snapshot.

        Raises
        ------
        ValueError
            If the cache has seen no tokens yet.
        """
        if self.state is None:
            raise ValueError("cache: has seen no tokens yet, so there is nothing to save")
        sliding = {}
        for i, layer in self.sliding_layers.items():
            sliding[f"{i}.keys"], sliding[f"{i}.values"] = layer.keys, layer.values
        seen = [self.get_seq_length(i) for i in range(len(self))]
        save_cache(check_path("folder", folder), self.state, sliding, seen)

    @classmethod
    def load(
        cls, folder: str | Path, manager: CacheManager, model_config: Any, *, device: Any = None
    ) -> LessCache:
        """Read a cache that `save` wrote, to go on with it.

        Parameters
        ----------
        folder
            What `save` wrote.
        manager, model_config
            As of `LessCache`, those it was made with.
        device
            Where the arrays go. Default: the CPU.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If one is damaged, or was made with another config, other maps or another model.
        """
        folder = check_path("folder", folder)
        cache = cls(manager, model_config)
        state, saved = load_cache(folder, lambda path: manager.load(path, device=device))
        own = cache.sliding_layers
        wanted = {f"{i}.{name}" for i in own for name in ("keys", "values")}
        if len(saved.seen) != len(cache) or set(saved.sliding) != wanted:
            raise ValueError(
                f"{saved.path}: made for {len(saved.seen)} layers, of which "
                f"{sorted(saved.sliding)} slide; the model has {len(cache)}, of which "
                f"{sorted(wanted)} slide"
            )
        for name, tensor in saved.sliding.items():
            seen = saved.seen[int(name.partition(".")[0])]
            heads, head_dim = manager.config.kv_heads, manager.config.head_dim
            shape = tuple(tensor.shape)
            if (*shape[:2], *shape[3:]) != (state.batch_size, heads, head_dim) or shape[2] > seen:
                raise ValueError(
                    f"{saved.path}: {name}: shape {shape}, expected [{state.batch_size}, {heads}, "
                    f"tokens, {head_dim}] of at most {seen} tokens"
                )
        for i, layer in own.items():
            keys, values = (saved.sliding[f"{i}.{name}"].to(device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, saved.seen[i]
        cache.seen.set(saved.seen[cache.layers.index(cache.less_layers[0])])
        cache.adopt(state)
        return cache
