"""What a cache makes of text, beside the full cache: the last word on every choice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._files import json_digest, json_text, parse_json, write_text
from ..evaluation.perplexity import Contestant, logits_under

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**30
"""The full cache's logits are kept, not computed again for each cache, if all take no more."""


@dataclass(frozen=True)
class Verdict:
    """A cache on the validation text.

    Parameters
    ----------
    name
        Of the cache.
    loss
        Nats a token.
    divergence
        KL divergence of its predictions from the full cache's, in nats a token.
    nbytes
        Of one sequence, pairs stored as they are counted in 16 bits; 0 for the full cache.
    """

    name: str
    loss: float
    divergence: float
    nbytes: int


class Judge:
    """Judges caches on some text, each once: verdicts are kept in files.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokens
        [n, N] token ids.
    folder
        For the verdicts.
    batch
        Sequences a forward pass.
    """

    def __init__(self, model: Any, tokens: Tensor, folder: Path, batch: int) -> None:
        self.model, self.batches, self.folder = model, tokens.split(batch), folder
        self.kept: dict[int, Tensor] = {}

    def judge(self, contestant: Contestant) -> Verdict:
        """The verdict, from its file where there is one of the very same cache."""
        path = self.folder / f"{digest_of_cache(contestant)}.json"
        if path.exists():
            verdict = Verdict(**parse_json(str(path), path.read_bytes()))
        else:
            verdict = self._measured(contestant)
            write_text(path, json_text(verdict.__dict__) + "\n")
        verdict = Verdict(contestant.name, verdict.loss, verdict.divergence, verdict.nbytes)
        logger.info("%s: %.4f nats from full", verdict.name, verdict.divergence)
        return verdict

    @torch.no_grad()
    def _measured(self, contestant: Contestant) -> Verdict:
        logits_of = logits_under(self.model, contestant)
        loss = divergence = 0.0
        for number, part in enumerate(self.batches):
            ids = part.to(self.model.device)
            wanted = self._full(number, ids)
            found = wanted if contestant.config is None else logits_of(ids)
            for a, b, own in zip(wanted, found, ids, strict=True):
                a, b = a[:-1].float().log_softmax(1), b[:-1].float().log_softmax(1)
                loss -= float(b.gather(1, own[1:].unsqueeze(1)).double().sum())
                divergence += float(F.kl_div(b, a, reduction="sum", log_target=True).double())
        count = sum(part.shape[0] * (part.shape[1] - 1) for part in self.batches)
        config = contestant.config
        nbytes = 0 if config is None else config.bytes_per_sequence("float16")
        return Verdict(contestant.name, loss / count, divergence / count, nbytes)

    def _full(self, number: int, ids: Tensor) -> Tensor:
        """What the full cache predicts for a batch; kept where it is small."""
        if number in self.kept:
            return self.kept[number]
        logits: Tensor = self.model(ids, use_cache=False).logits
        if logits.nbytes * len(self.batches) <= KEPT_BYTES:
            self.kept[number] = logits
        return logits


def digest_of_cache(contestant: Contestant) -> str:
    """What tells a cache from every other one: its config, maps and bases."""
    parts: Sequence[Any] = (
        None if contestant.config is None else contestant.config.to_dict(),
        None if contestant.maps is None else contestant.maps.digest,
        None if contestant.transforms is None else contestant.transforms.digest,
    )
    return json_digest(parts)[:32]
