"""A model on fixed text, run anew from one layer on with another attention output there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import CacheConfig
from ..integrations.transformers.interception import Enough, intercepted
from ..integrations.transformers.model_check import attention_modules, unwrapped
from ..training.collect import full_attention


@dataclass(frozen=True)
class LayerText:
    """What one layer sees and gives on the text, under the full cache.

    Parameters
    ----------
    index
        Which full-attention layer, from 0.
    q, k, v, out
        [n, Hq, N, D], [n, Hkv, N, D], [n, Hkv, N, D], [n, Hq, N, D].
    before
        What the decoder layer before gave, for each batch; empty where there is none.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    before: list[Any]


class Replay:
    """How far the model's predictions move when one layer attends otherwise.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokens
        [n, N] token ids, no padding.
    config
        The model's cache; its numbers of slots do not matter.
    batch
        Sequences a forward pass.
    """

    def __init__(self, model: Any, tokens: Tensor, config: CacheConfig, batch: int = 4) -> None:
        self.model = model
        self.config = config
        self.batches = list(tokens.split(batch))
        self.blocks = _decoder_layers(model)
        self._wanted = [self._full(ids) for ids in self.batches]

    @torch.no_grad()
    def layer(self, index: int) -> LayerText:
        """One pass that notes what layer `index` sees and gives."""
        seen: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "out": []}
        before: list[Any] = []
        spec = self.config.layer(index)

        def attend(at: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = full_attention(self.config.layer(at), q, k, v)
            if at == index:
                for name, value in (("q", q), ("k", k), ("v", v), ("out", out)):
                    seen[name].append(value)
                raise Enough
            return out

        last = self._blocks_before(index)[-1:]
        with contextlib.ExitStack() as undo:
            for block in last:
                hook = block.register_forward_hook(lambda *call: before.append(call[2]))
                undo.callback(hook.remove)
            undo.enter_context(intercepted(self.model, attend))
            for ids in self.batches:
                with contextlib.suppress(Enough):
                    self.model(ids.to(self.model.device), use_cache=False)
        joined = {name: torch.cat(parts) for name, parts in seen.items()}
        assert joined["out"].shape[1] == spec.query_heads
        return LayerText(index, **joined, before=before)

    @torch.no_grad()
    def distance(self, text: LayerText, out: Tensor) -> float:
        """KL divergence of the predictions from the full cache's, in nats a token.

        Parameters
        ----------
        text
            From `layer`.
        out
            [n, Hq, N, D], what that layer's attention gives now; later layers have full caches.
        """
        total = 0.0
        start = 0
        for number, ids in enumerate(self.batches):
            mine = out[start : start + len(ids)]
            start += len(ids)

            def attend(at: int, q: Tensor, k: Tensor, v: Tensor, mine: Tensor = mine) -> Tensor:
                if at == text.index:
                    return mine.to(q.dtype)
                return full_attention(self.config.layer(at), q, k, v)

            with self._skipping(text, number), intercepted(self.model, attend):
                logits = self.model(ids.to(self.model.device), use_cache=False).logits
            total += _divergence(self._wanted[number], logits)
        return total / sum(ids.numel() for ids in self.batches)

    @torch.no_grad()
    def _full(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids.to(self.model.device), use_cache=False).logits
        return logits

    def _blocks_before(self, index: int) -> list[Any]:
        own = self.blocks.index(_block_of(self.model, self.blocks, index))
        return self.blocks[:own]

    @contextlib.contextmanager
    def _skipping(self, text: LayerText, number: int) -> Iterator[None]:
        """The decoder layers before the text's give at once what they gave then."""
        before = self._blocks_before(text.index)
        try:
            for block in before:
                block.forward = lambda *_, given=text.before[number], **__: given
            yield
        finally:
            for block in before:
                block.__dict__.pop("forward", None)


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """Summed over tokens; a sequence at a time, for logits are large."""
    return sum(
        float(
            F.kl_div(
                b.float().log_softmax(1), a.float().log_softmax(1), reduction="sum", log_target=True
            )
        )
        for a, b in zip(wanted, found, strict=True)
    )


def _decoder_layers(model: Any) -> list[Any]:
    """The list of the model's decoder layers, in order: what holds its attention modules."""
    module = attention_modules(unwrapped(model))[0]
    for parent in unwrapped(model).modules():
        if isinstance(parent, torch.nn.ModuleList) and any(
            module is part for block in parent for part in block.modules()
        ):
            return list(parent)
    raise ValueError(f"model: {type(model).__name__} has no list of decoder layers")


def _block_of(model: Any, blocks: list[Any], index: int) -> Any:
    module = attention_modules(unwrapped(model))[index]
    return next(b for b in blocks if any(module is part for part in b.modules()))
