"""How long a small cache's greedy continuation stays that of the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import attach
from .perplexity import Contestant


@torch.no_grad()
def continue_greedily(
    model: Any,
    prompts: Tensor,
    contestant: Contestant,
    *,
    new_tokens: int,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Greedy continuations under a contestant's cache.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    prompts
        [B, S] token ids, no padding.
    contestant
        The cache.
    new_tokens
        Length of the continuations; the end of a text does not stop them.
    repetition_penalty
        As of transformers' generate(); a small model's greedy text goes round in circles without.

    Returns
    -------
    Tensor
        [B, new_tokens].
    """
    attached: Any = nullcontext()
    if contestant.config is not None:
        attached = attach(
            model, contestant.config, contestant.maps, transforms=contestant.transforms
        )
    prompts = prompts.to(model.device)
    with attached:
        whole = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            repetition_penalty=repetition_penalty,
            pad_token_id=0,
        )
    return whole[:, prompts.shape[1] :].cpu()  # type: ignore[no-any-return]


def accepted_prefix(wanted: Tensor, found: Tensor) -> Tensor:
    """How many of the first tokens agree, for each row of [B, n]: [B]."""
    return (wanted == found).to(torch.int64).cumprod(1).sum(1)


def agreement(
    model: Any,
    prompts: Tensor,
    contestants: Sequence[Contestant],
    *,
    new_tokens: int = 64,
    batch: int = 8,
) -> dict[str, float]:
    """Mean accepted prefix of each contestant's greedy continuations, in tokens.

    The number of tokens that a draft made with the small cache would keep when the full cache
    checks it.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    prompts
        [n, S] token ids.
    contestants
        The caches.
    new_tokens
        Length of the continuations, and so the largest result.
    batch
        Prompts at a time.
    """
    full = Contestant("full")
    totals = {contestant.name: 0.0 for contestant in contestants}
    for rows in prompts.split(batch):
        wanted = continue_greedily(model, rows, full, new_tokens=new_tokens)
        for contestant in contestants:
            found = continue_greedily(model, rows, contestant, new_tokens=new_tokens)
            totals[contestant.name] += float(accepted_prefix(wanted, found).sum())
    return {name: total / len(prompts) for name, total in totals.items()}
