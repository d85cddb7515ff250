"""What a cache still knows in the end: hidden texts asked for, in decode semantics throughout.

The prompt attends and leaves token by token, too. Where a prompt goes in whole, its last tokens see
all of it, and nothing would have to be remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import CacheConfig
from ..integrations.transformers import LessCache, attach
from ..integrations.transformers.padding import padded
from ..policies import FullCache
from .needles import Example
from .perplexity import Contestant


@dataclass(frozen=True)
class Recalled:
    """What came of one example.

    Parameters
    ----------
    share
        Of the answers that the greedy continuation has.
    nats
        Of the reference, a token.
    text
        The greedy continuation.
    """

    share: float
    nats: float
    text: str


def cache_of(model: Any, contestant: Contestant, tokens: int) -> CacheConfig:
    """The contestant's config; of the full cache one that holds so many tokens."""
    if contestant.config is not None:
        return contestant.config
    return CacheConfig.from_model(
        model.config, capacity=tokens, policy=FullCache(), rank=0, dtype=model.dtype
    )


@torch.no_grad()
def recall(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    contestant: Contestant,
    *,
    new_tokens: int,
    batch: int = 8,
) -> list[Recalled]:
    """Ask a model with a cache what its prompts hid.

    Parameters
    ----------
    model, tokenizer
        A transformers model that `attach` takes.
    examples
        From `make_example`.
    contestant
        The cache.
    new_tokens
        Of the greedy continuation.
    batch
        Examples at a time.
    """
    more = max(new_tokens, *(len(example.reference) for example in examples))
    config = cache_of(model, contestant, max(len(x.prompt) for x in examples) + more)
    found = []
    with attach(
        model, config, contestant.maps, scoring=True, transforms=contestant.transforms
    ) as handle:
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            # On the left, so that every prompt ends in the last column.
            ids, mask = (x.to(model.device) for x in padded([x.prompt for x in part], side="left"))
            cache = handle.new_cache()
            first = model(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                past_key_values=cache,
                logits_to_keep=1,
            ).logits
            nats = _reference_nats(model, part, cache.clone(), mask, first)
            texts = _continued(model, tokenizer, cache, mask, first, new_tokens)
            for example, own, text in zip(part, nats, texts, strict=True):
                share = sum(answer in text for answer in example.answers) / len(example.answers)
                found.append(Recalled(share, own, text))
    return found


def _reference_nats(
    model: Any,
    part: Sequence[Example],
    cache: LessCache,
    mask: torch.Tensor,
    first: torch.Tensor,
) -> list[float]:
    """Nats a token of each reference after its prompt."""
    ids, present = padded([example.reference for example in part], side="right")
    ids, present = ids.to(mask.device), present.to(mask.device)
    logits = first
    if ids.shape[1] > 1:
        later = model(
            ids[:, :-1],
            attention_mask=torch.cat([mask, present[:, :-1]], 1),
            position_ids=mask.sum(1, keepdim=True)
            + torch.arange(ids.shape[1] - 1, device=ids.device),
            past_key_values=cache,
        ).logits
        logits = torch.cat([first, later], 1)
    scores = logits.float().log_softmax(2).gather(2, ids.unsqueeze(2)).squeeze(2)
    means = -(scores * present).sum(1) / present.sum(1)
    return [float(mean) for mean in means]


def _continued(
    model: Any,
    tokenizer: Any,
    cache: LessCache,
    mask: torch.Tensor,
    first: torch.Tensor,
    new_tokens: int,
) -> list[str]:
    """Greedy continuations of the prompts that a cache has seen."""
    token = first[:, -1:].argmax(2)
    tokens = [token]
    place = mask.sum(1, keepdim=True)
    for _ in range(new_tokens - 1):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        logits = model(token, attention_mask=mask, position_ids=place, past_key_values=cache).logits
        token = logits[:, -1:].argmax(2)
        tokens.append(token)
        place = place + 1
    return [tokenizer.decode(row, skip_special_tokens=True) for row in torch.cat(tokens, 1)]
