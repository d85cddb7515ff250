"""`attach`: a transformers model runs with a less_cache for as long as it is attached."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ...config import CacheConfig
from ...feature_maps import FeatureMaps
from ...manager import CacheManager
from ...quantization.transforms import Transforms
from ...recipe import CacheRecipe
from ..introspection import description
from .cache import LessCache
from .captured import captured_forward, check_graph, check_not_compiled
from .falcon import cached_layer, check_falcon, falcon_forward
from .forward import ModelHooks, hand_on
from .generation import wrap_generate
from .interface import register
from .model_check import (
    attention_modules,
    check_fit,
    check_model,
    decoder_of,
    model_device,
    unwrapped,
)
from .scoring import ScoringLayer

__all__ = ["Attachment", "LessCache", "attach"]

_ATTACHED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The decoders that are attached now."""


class Attachment:
    """A model with its cache attached; a context manager that detaches at its end.

    Attributes
    ----------
    model
        The transformers model, without what `attach` was given it in.
    manager : CacheManager
        Config, maps and backend of all its caches.
    scoring : bool
        Whether tokens of one pass attend as if they came one by one.
    cuda_graph : bool
        Whether passes of one token are captured as CUDA graphs, and replayed.
    """

    def __init__(
        self, model: Any, manager: CacheManager, *, scoring: bool = False, cuda_graph: bool = False
    ) -> None:
        self.model = model
        self.manager = manager
        self.scoring = scoring
        self.cuda_graph = cuda_graph
        self._undo = contextlib.ExitStack()
        self._attached = False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Attachment({name}, attached={self.attached}, {self.manager.config})"

    @property
    def attached(self) -> bool:
        """Whether the model still runs with the cache."""
        return self._attached

    def new_cache(self, batch_size: int | None = None) -> LessCache:
        """An empty cache to pass as ``past_key_values``, and to keep for a later turn.

        Parameters
        ----------
        batch_size
            Sequences. Default: those of the first forward pass.
        """
        return LessCache(self.manager, self.model.config, batch_size=batch_size)

    def load_cache(self, folder: str | Path) -> LessCache:
        """Read a cache that `LessCache.save` wrote, onto the model's device.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If one is damaged, or was made with another config, other maps or another model.
        """
        device = model_device(attention_modules(self.model))
        return LessCache.load(folder, self.manager, self.model.config, device=device)

    def detach(self) -> None:
        """Give the model back as it was; nothing happens the second time."""
        self._undo.close()

    def _apply(self, modules: list[Any]) -> None:
        decoder = decoder_of(self.model, modules)
        alone: list[Any] = [None] * len(modules)
        if self.scoring:
            alone = [ScoringLayer(self.manager, index) for index in range(len(modules))]
        scoring = alone if self.scoring else None
        hooks = ModelHooks(decoder, self.manager, self.new_cache, scoring)
        with contextlib.ExitStack() as undo:
            _ATTACHED.add(decoder)
            undo.callback(_ATTACHED.discard, decoder)
            for handle in (
                decoder.register_forward_pre_hook(hooks.before, with_kwargs=True),
                decoder.register_forward_hook(hooks.after, with_kwargs=True),
            ):
                undo.callback(handle.remove)
            if hooks.is_falcon:
                for module, layer in zip(modules, alone, strict=True):
                    forward = falcon_forward(module, cached_layer(module, layer))
                    _override(undo, module, "forward", forward)
            else:
                for module, layer in zip(modules, alone, strict=True):
                    hook = module.register_forward_pre_hook(hand_on(layer), with_kwargs=True)
                    undo.callback(hook.remove)
                original = decoder.config._attn_implementation
                undo.callback(setattr, decoder.config, "_attn_implementation", original)
                decoder.config._attn_implementation = register(original)
            head = self.model.get_output_embeddings()
            if head is not None:
                undo.callback(head.register_forward_pre_hook(hooks.before_head).remove)
            if self.cuda_graph:
                step = captured_forward(self.model, decoder, hooks, self.manager)
                _override(undo, self.model, "forward", step)
            if callable(getattr(self.model, "generate", None)):
                _override(undo, self.model, "generate", wrap_generate(self.model, self.new_cache))
            self._attached = True
            undo.callback(setattr, self, "_attached", False)
            # Up to here an error undoes everything; from here on detach() does.
            self._undo = undo.pop_all()


def attach(
    model: Any,
    config: CacheConfig | CacheRecipe | str | Path,
    maps: FeatureMaps | None = None,
    backend: str = "auto",
    *,
    scoring: bool = False,
    cuda_graph: bool = False,
    transforms: Transforms | None = None,
) -> Attachment:
    """Let a transformers model run with a less_cache, until it is detached.

    ``with attach(model, config, maps):`` detaches at the end of the block, also after an error;
    without ``with``, call `Attachment.detach`. Every call of generate(), and every forward pass
    that is given no cache, gets a fresh `LessCache`; pass one of `Attachment.new_cache` as
    ``past_key_values`` to keep it for a second turn.

    The tokens of one pass see each other, and the cache evicts at its end. What such a pass says of
    any position but its last is therefore what the full cache says: to score text, attach with
    ``scoring=True``. Without it a pass that is asked for such logits warns once
    (`FullAttentionWarning`), and one with ``use_cache=False`` is the model's own.

    Parameters
    ----------
    model
        A causal language model whose attention is built as Llama's is (Llama, Mistral, Qwen2,
        Qwen3, Phi-3, Gemma 2 and 3 and their like), or Falcon without ALiBi. Sliding-window layers
        keep their own cache. It may come in a PEFT model or from ``torch.compile(model)``.
    config
        For its full-attention layers; ``CacheConfig.from_model(model.config, ...)`` makes it. Or a
        whole `CacheRecipe`, or the folder or hub id of one: it has maps and transforms of its own,
        is taken in the model's dtype, and refused where it was made for another model.
    maps
        φ and ψ; needed where a layer's rank is above 0.
    backend
        As of `CacheManager`.
    scoring
        Let every pass compute what decoding its tokens one by one would, evictions included, and
        leave its cache as that would: what perplexity and lm-eval are to measure. Differentiable
        in the model, its inputs and the maps, though not through an earlier pass's cache, nor
        through the choice of what leaves. The prompt of generate() is fed so too.

        It costs a decode step a token in each full-attention layer, of the attention alone; with
        ``use_cache=False`` only the policy's part of it, or what a backend has for that. Memory
        is a decode step's; where gradients flow, or with ``use_cache=False``, also the weights of
        256 queries over all tokens.
    cuda_graph
        Capture the pass of one token a sequence as a CUDA graph, and replay it for each token: the
        host then launches one thing a token, where it launched some hundred. A cache's first
        token after the prompt runs as ever, its second is captured; a cache that is `reset` keeps
        its graph. Passes under autocast or with gradients, and those that are asked for more than
        logits, run as ever. A graph holds what the model was when it was made: detach before you
        change weights' places, adapters or hooks.
    transforms
        The bases of codes; needed where a layer has calibrated ones.

    Returns
    -------
    Attachment
        The handle: a context manager with `new_cache`, `load_cache` and `detach`.

    Raises
    ------
    TypeError
        If `model` is no transformers model, `config` no `CacheConfig`, or `scoring` or
        `cuda_graph` no bool.
    ValueError
        If the model's kind is not supported, its layers are on several devices, it is attached
        already, config or maps do not fit it, or there is no graph to be made of its steps. The
        model is unchanged then.
    """
    for name, flag in (("scoring", scoring), ("cuda_graph", cuda_graph)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r} of type {type(flag).__name__}, expected bool")
    if cuda_graph:
        check_not_compiled(model)
    model = unwrapped(model)
    if isinstance(model, nn.Module) and any(part in _ATTACHED for part in model.modules()):
        raise ValueError("model: already attached; detach it first")
    check_model(model)
    if model.config.model_type == "falcon":
        check_falcon(model.config)
    modules = attention_modules(model)
    if not isinstance(config, CacheConfig):
        if not isinstance(config, (CacheRecipe, str, Path)):
            raise TypeError(
                f"config: got {type(config).__name__}, expected a CacheConfig, a CacheRecipe, or "
                "the folder or hub id of one"
            )
        if maps is not None or transforms is not None:
            raise ValueError(
                "config: a recipe has maps and transforms of its own, but some are given"
            )
        recipe = CacheRecipe.from_pretrained(config) if isinstance(config, (str, Path)) else config
        config, maps, transforms = _parts_for(model, recipe)
    check_fit(model, modules, config)
    manager = CacheManager(config, maps, backend=backend, transforms=transforms)
    if cuda_graph:
        check_graph(model, modules, manager, scoring)
    attachment = Attachment(model, manager, scoring=scoring, cuda_graph=cuda_graph)
    attachment._apply(modules)
    return attachment


def _parts_for(
    model: Any, recipe: CacheRecipe
) -> tuple[CacheConfig, FeatureMaps | None, Transforms | None]:
    """What a recipe says for this model."""
    recipe.check_model(description(model.config))
    return recipe.config.with_dtype(model.dtype), recipe.maps, recipe.transforms


def _override(undo: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Set an attribute of one object, in front of its class's; `undo` removes it again."""
    before = vars(target).get(name)
    if before is None:
        undo.callback(delattr, target, name)
    else:
        undo.callback(setattr, target, name, before)
    setattr(target, name, value)
