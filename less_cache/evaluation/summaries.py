"""Summaries written with a cache, and how much of the reference they share: ROUGE.

The paper's protocol: a prompt goes in whole, then the cache evicts; sampling at temperature 0.3 for
128 tokens; what comes after ``###`` is dropped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from ..integrations.transformers import attach
from ..integrations.transformers.padding import padded
from .perplexity import Contestant

STOP = "###"
NEW_TOKENS = 128
TEMPERATURE = 0.3
MEASURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def check_can_judge() -> None:
    """Refuse to begin what ROUGE could not judge.

    Raises
    ------
    ImportError
        If rouge-score is missing.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise ImportError("table: summaries need rouge-score: install less_cache[paper]")


@torch.no_grad()
def write_summaries(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    contestant: Contestant,
    *,
    new_tokens: int = NEW_TOKENS,
    temperature: float = TEMPERATURE,
    seed: int = 42,
    batch: int = 1,
    progress: bool = True,
) -> list[str]:
    """What a model writes after prompts.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokenizer
        Its tokenizer.
    prompts
        Token ids of each.
    contestant
        The cache.
    new_tokens
        The most that is written.
    temperature
        0 is greedy.
    seed
        Of the first batch; each has its own.
    batch
        Prompts at a time, padded on the left.
    progress
        Show a bar.
    """
    attached: Any = nullcontext()
    if contestant.config is not None:
        attached = attach(
            model, contestant.config, contestant.maps, transforms=contestant.transforms
        )
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts: dict[int, str] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with attached, tqdm(total=len(prompts), desc=contestant.name, disable=not progress) as bar:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            ids, mask = padded([prompts[i] for i in part], side="left")
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed + start)
                whole = model.generate(
                    ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=new_tokens,
                    pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                    **drawn,
                )
            for row, i in enumerate(part):
                text = tokenizer.decode(whole[row, ids.shape[1] :], skip_special_tokens=True)
                texts[i] = text.partition(STOP)[0].strip()
            bar.update(len(part))
    return [texts[i] for i in range(len(prompts))]


def rouge(written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L in percent, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([*MEASURES], use_stemmer=False)
    found = [scorer.score(right, text) for text, right in zip(written, wanted, strict=True)]
    return {
        told: 100 * sum(scores[name].fmeasure for scores in found) / len(found)
        for name, told in MEASURES.items()
    }
