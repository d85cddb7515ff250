"""lm-evaluation-harness judges a model with its cache: importing this adds ``--model less-cache``.

Every score is that of decoding token by token with evictions. Requests that share a prompt, as the
choices of a question do, go through it once: each continues a copy of the prompt's cache.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import CacheConfig, Slots
from ..feature_maps import FeatureMaps
from ..policies import DEFAULT_POLICY, Policy, parse_policy
from ..provenance import mismatches
from ..quantization.transforms import Transforms
from ..recipe import CacheRecipe
from .transformers import attach
from .transformers.padding import padded

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"lm_eval: {error}; install less_cache[lm-eval]") from None

logger = logging.getLogger(__name__)

NAME = "less-cache"
"""What ``--model`` calls it."""

SHIPPED = "reference"
"""What ``pretrained=`` calls the model that ships with the package."""

Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether greedy decoding would have said it."""


@register_model(NAME)  # type: ignore[untyped-decorator]
class LessCacheLM(HFLM):  # type: ignore[misc]
    """A transformers model with a less_cache attached, in decode semantics.

    ``lm_eval``'s own ``hf`` model with three more arguments. Rolling windows, generation, chat
    templates and the loading of models are its.

    Parameters
    ----------
    pretrained
        Folder or hub id, or a loaded model; ``reference`` is the shipped one.
    capacity
        As of `CacheConfig`: 52, 0.05, ``5%``. Needed without `cache`.
    policy
        As on the command line; default: ``sinkwindow``. Between fields stands a plus where lm_eval
        would take a comma for the next argument: ``sinkwindow:sinks=4+recent=16``.
    maps
        Folder or hub id of feature maps, or the maps; without, the policy runs alone.
    cache
        Folder or hub id of a whole cache, or a `CacheRecipe`, in place of the three above;
        ``reference:5%`` is one that ships with the shipped model.
    cache_backend
        As `CacheManager`'s ``backend``; lm_eval has an argument of that name.
    **arguments
        Those of ``hf``.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        If the config or the maps are none, or do not fit the model; if the cache was made for
        another model, or something that it says is given as well.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        capacity: Slots | Sequence[Slots | Sequence[Slots]] | None = None,
        policy: str | Policy | None = None,
        maps: str | FeatureMaps | None = None,
        cache: str | Path | CacheRecipe | None = None,
        cache_backend: str = "auto",
        **arguments: Any,
    ) -> None:
        if cache is None and capacity is None:
            raise ValueError("capacity: got None; expected capacity=, or cache= with a whole cache")
        for name, value in (("capacity", capacity), ("policy", policy), ("maps", maps)):
            if cache is not None and value is not None:
                raise ValueError(f"{name}: given beside cache=, which has its own; leave it out")
        if isinstance(policy, str):
            policy = parse_policy(policy.replace("+", ","))
        if isinstance(maps, str):
            maps = FeatureMaps.from_pretrained(maps)
        if isinstance(cache, (str, Path)):
            from ..reference_model import cache_folder

            cache = CacheRecipe.from_pretrained(cache_folder(str(cache)))
        if pretrained == SHIPPED:
            from ..reference_model import path

            pretrained = str(path())
        super().__init__(pretrained=pretrained, **arguments)
        if cache is None:
            config = CacheConfig.from_model(
                self.model.config,
                capacity=capacity,
                policy=parse_policy(DEFAULT_POLICY) if policy is None else policy,
                rank=0 if maps is None else maps.rank,
                dtype=self.model.dtype,
            )
            cache = CacheRecipe(config, maps)
            for told in [] if maps is None else mismatches(maps, config):
                logger.warning("less_cache: maps: %s", told)
        self.attachment = attach(self.model, cache, backend=cache_backend, scoring=True)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes of the model beside its results: the cache, too."""
        manager = self.attachment.manager
        parts = {"cache_maps": manager.maps, "cache_transforms": manager.transforms}
        digests = {name: None if part is None else part.digest for name, part in parts.items()}
        own = {"cache": str(manager.config), **digests}
        return {**super().get_model_info(), **own}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """The answers to requests of a text, a context's and a continuation's tokens."""
        pieces = [self._fitted(context, more) for _, context, more in requests]
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pieces):
            by_context.setdefault(tuple(context), []).append(i)
        shared, alone = [], []
        for shared_context, members in by_context.items():
            # Continuations cost a step each; alone they are part of one cheaper pass.
            saved = (len(members) - 1) * len(shared_context)
            fed = sum(len(pieces[i][1]) - 1 for i in members)
            if saved > fed:
                shared.append(members)
            else:
                alone.extend(members)
        alone.sort(key=lambda i: -sum(map(len, pieces[i])))
        shared.sort(key=lambda members: -len(pieces[members[0]][0]))
        size = override_bs or self.batch_size
        if size == "auto":
            longest = min(range(len(requests)), key=lambda i: -sum(map(len, pieces[i])))
            size = self._detect_batch_size(requests, longest)
        answers: dict[int, Answer] = {}
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="loglikelihood", disable=silent) as bar:
            for found in (
                *(self._without_cache(pieces, part) for part in parts_of(alone, size)),
                *(self._from_prompts(pieces, part, size) for part in parts_of(shared, size)),
            ):
                for i, answer in found:
                    answers[i] = answer
                    text = requests[i][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                    bar.update(1)
        return [answers[i] for i in range(len(requests))]

    def _fitted(self, context: list[int], more: list[int]) -> tuple[list[int], list[int]]:
        """Both without what would be beyond the model's positions, on the left."""
        if not context or not more or len(more) > self.max_length:
            raise ValueError(
                f"request: got {len(context)} tokens of context and {len(more)} to score, expected "
                f"at least one of each and at most {self.max_length} to score"
            )
        # The last token is only foreseen, never fed.
        return context[-(self.max_length + 1 - len(more)) :], more

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor, **arguments: Any) -> Tensor:
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(
                ids.to(self.device), attention_mask=mask.to(self.device), **arguments
            ).logits

    def _without_cache(
        self, pieces: list[tuple[list[int], list[int]]], part: list[int]
    ) -> Iterator[tuple[int, Answer]]:
        """Answers of requests whose cache nobody goes on from."""
        texts = [[*pieces[i][0], *pieces[i][1][:-1]] for i in part]
        ids, mask = padded(texts, side="right")
        logits = self._forward(ids, mask, use_cache=False)
        for row, i in enumerate(part):
            stop, more = len(texts[row]), pieces[i][1]
            yield i, self._judged(logits[row, stop - len(more) : stop], more)

    def _from_prompts(
        self, pieces: list[tuple[list[int], list[int]]], groups: list[list[int]], size: int
    ) -> Iterator[tuple[int, Answer]]:
        """Answers of requests that go on from copies of their prompts' caches."""
        # On the left, so that every prompt ends in the last column.
        ids, mask = padded([pieces[members[0]][0] for members in groups], side="left")
        seen = mask.sum(1, keepdim=True)
        cache = self.attachment.new_cache()
        first = self._forward(
            ids,
            mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self.device),
            past_key_values=cache,
            logits_to_keep=1,
        )
        asked = [(row, i) for row, members in enumerate(groups) for i in members]
        asked.sort(key=lambda entry: -len(pieces[entry[1]][1]))
        for part in parts_of(asked, size):
            rows = torch.tensor([row for row, _ in part])
            logits = first[rows.to(first.device)]
            more, present = padded([pieces[i][1][:-1] for _, i in part], side="right")
            if more.shape[1]:
                copy = cache.clone()
                copy.batch_select_indices(rows)
                later = self._forward(
                    more,
                    torch.cat([mask[rows], present], 1),
                    position_ids=(seen[rows] + torch.arange(more.shape[1])).to(self.device),
                    past_key_values=copy,
                )
                logits = torch.cat([logits, later], 1)
            for own, (_, i) in zip(logits, part, strict=True):
                yield i, self._judged(own[: len(pieces[i][1])], pieces[i][1])

    def _judged(self, logits: Tensor, more: list[int]) -> Answer:
        """The answer, from logits [n, vocabulary] that foresee n tokens."""
        tokens = torch.tensor(more, device=logits.device)
        scores = logits.log_softmax(1, dtype=self.softmax_dtype or torch.float32)
        greedy = bool((logits.argmax(1) == tokens).all())
        return float(scores.gather(1, tokens.unsqueeze(1)).sum()), greedy


def run_command(words: Sequence[str]) -> None:
    """Run lm_eval's command line, to which this module has made the model known.

    Parameters
    ----------
    words
        As of ``sys.argv``: the program, then lm_eval's arguments.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = [*words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def parts_of(items: Sequence[Any], size: int) -> Iterable[Any]:
    """Stretches of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


@functools.lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """lm_eval's list of tasks: reading it takes longer than many a task."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def judge_tasks(
    model: Any,
    tokenizer: Any,
    config: CacheConfig | None,
    maps: FeatureMaps | None,
    *,
    transforms: Transforms | None = None,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch: int = 1,
    max_length: int | None = None,
) -> dict[str, float]:
    """A loaded model's figures on tasks of lm_eval, with a cache or its own full one.

    Parameters
    ----------
    model, tokenizer
        A transformers model that `attach` takes.
    config
        Of the cache; ``None``: the model's own.
    maps
        Where the config's rank is above 0.
    transforms
        Where the config's codes have calibrated bases.
    tasks, include_path, limit
        As of lm_eval's command.
    batch
        Requests at a time.
    max_length
        Tokens that the model reads at once; ``None``: its longest sequence.

    Returns
    -------
    dict
        By task and measure, without standard errors.
    """
    from lm_eval import simple_evaluate

    given = {"tokenizer": tokenizer, "batch_size": batch, "max_length": max_length}
    if config is None:
        judge = HFLM(pretrained=model, **given)
    else:
        judge = LessCacheLM(model, cache=CacheRecipe(config, maps, transforms), **given)
    try:
        found = simple_evaluate(
            judge,
            tasks=[*tasks],
            task_manager=_task_manager(include_path),
            limit=limit,
            # Standard errors are not asked for.
            bootstrap_iters=0,
        )
    finally:
        if config is not None:
            judge.attachment.detach()
    return {
        f"{task} {measure.partition(',')[0]}": float(value)
        for task, values in found["results"].items()
        for measure, value in values.items()
        if isinstance(value, float) and "stderr" not in measure
    }
