"""The best cache for a number of bytes: measure, choose, train, judge, keep what is best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .._checks import check_int, check_path
from .._files import json_text, parse_json, write_text
from ..config import CacheConfig
from ..distributed import Ray, run_tasks
from ..evaluation.perplexity import Contestant
from ..evaluation.surroundings import surroundings
from ..feature_maps import FeatureMaps
from ..integrations.introspection import description
from ..integrations.transformers.model_check import attention_modules, check_fit, check_model
from ..maps_io import public_name
from ..policies import DecayedH2O, Policy, SinkWindow
from ..recipe import CacheRecipe
from ..training.runs import claim, digest_tokens, model_digest
from .allocation import Plan, choose
from .budget import parse_budget
from .candidates import ablations, simple_caches
from .effort import Effort, effort_within, seconds_per_pass, split
from .offers import config_of, least_bytes, offers_of
from .stages import SLOTS, Stages

POLICIES: tuple[Policy, ...] = (SinkWindow(1), SinkWindow(4), DecayedH2O(factor=0.99))
"""What is tried where nothing is asked for. Sinks cost heads with a handful of slots dearly, and
not every model needs four."""
RANKS = (4,)
CURVE = (0.5, 2.0)
"""Shares of the budget at which the curve has points besides the budget itself."""
FULL = "full cache"
TOGETHER = "trained together"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Parameters
    ----------
    recipe
        The cache.
    report
        All that was measured and chosen, JSON-ready.
    """

    recipe: CacheRecipe
    report: dict[str, Any]


def tune(
    model: Any,
    tokens: Tensor,
    budget: Any,
    out: str | Path,
    *,
    work: str | Path | None = None,
    context: int | None = None,
    effort: Effort | None = None,
    minutes: float | None = None,
    policies: Sequence[Policy] = POLICIES,
    ranks: Sequence[int] = RANKS,
    model_id: str | None = None,
    licence: str | None = None,
    progress: bool = True,
    on: Ray | None = None,
    device: str | None = None,
) -> Tuned:
    """Find the best cache for a number of bytes, and write it as one folder.

    Bases of codes are fitted; every KV head is measured with several numbers of slots, ways to
    code and, where it may pay, a low-rank state; bytes are handed out by what each saves, and once
    more when whole caches have shown where heads lose more together than apart; maps are trained
    where a state was chosen; whole caches, also with parts left out and the best simple ones, are
    judged on text that was used for nothing else; and the best is kept.

    A run that was killed goes on when it is started again with the same arguments, to the same
    result bit for bit on the CPU. On a Ray cluster layers and candidates are tasks, and come to
    that same result.

    Parameters
    ----------
    model
        A transformers model that `attach` takes.
    tokens
        [n, N] token ids, N the length that the cache is for; the last sequences are for
        validation alone.
    budget
        Bytes of one sequence, or a share of the full cache's in 16 bits: ``"5%"``, 0.05, 300000,
        ``"2.5M"``.
    out
        Folder of the result.
    work
        Folder of what a resumed run goes on from, and other budgets too: what heads lose is
        measured once for all of them. Default: ``work`` in `out`. On a cluster all machines must
        see it.
    context
        Tokens of the full cache that shares are of. Default: the model's longest.
    effort
        Text and steps for each part.
    minutes
        About how long it may take, instead of `effort`: text and steps are chosen to fit.
    policies, ranks
        What is tried, `ranks` besides 0.
    model_id
        The model's name, for the card.
    licence
        Of the result, for the card: an SPDX name.
    progress
        Show bars.
    on
        A cluster; ``None``: in this process.
    device
        Where a task puts the model. Default: where it is.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, there is too little text, the bytes hold no cache at all, or
        `out` holds a run with other settings.
    """
    folder = check_path("out", out)
    work = folder / "work" if work is None else check_path("work", work)
    if on is not None:
        work = work.resolve()
    check_model(model)
    config = _shapes(model, tokens, policies, ranks)
    context = check_int("context", context or config.max_positions or tokens.shape[1], minimum=2)
    total = parse_budget(budget, config, context)
    if total < (least := least_bytes(config, policies, SLOTS[0])):
        raise ValueError(
            f"budget: got {budget!r}, {total:,} bytes, expected at least {least:,}: {SLOTS[0]} "
            "slots for every head"
        )
    stages = _stages(
        model,
        tokens,
        config,
        work,
        work / f"{total}-bytes",
        effort=effort,
        minutes=minutes,
        policies=policies,
        ranks=ranks,
        model_id=model_id,
        progress=progress,
        on=on,
        device=device,
    )
    chosen, text = stages.effort, stages.text
    (bases,) = stages.run("calibrated", [()])
    losses = stages.run("measured", [(i, policies, own) for i, own in enumerate(bases)], "measure")
    plain = [offers_of(config, layer, found) for layer, found in enumerate(losses)]
    apart = choose(plain, total)
    (factors,) = stages.run("refined", [(plain, apart, total, bases)])
    plain = factors.of(plain)
    without = choose(plain, total)
    states = stages.run(
        "with_states", [(i, own.policy, ranks) for i, own in enumerate(without.offers)], "states"
    )
    offers = [
        offers_of(config, layer, found, curves)
        for layer, (found, curves) in enumerate(zip(losses, states, strict=True))
    ]
    plan = choose(factors.of(offers), total)

    def contestant(name: str, of: Plan, maps: FeatureMaps | None = None) -> Contestant:
        return Contestant(name, config_of(config, of), maps, stages.transforms(of, bases))

    candidates = [contestant("no state", without)]
    maps, transforms = None, stages.transforms(plan, bases)
    if any(offer.rank for offer in plan.offers):
        maps = stages.fitted(plan, transforms)
        candidates.append(contestant("state", plan, maps))
    if chosen.steps and (maps is not None or transforms is not None):
        (together,) = stages.run("distilled", [(plan, transforms, maps)])
        candidates.append(Contestant(TOGETHER, config_of(config, plan), *together))
    if without.capacities != apart.capacities or without.offers != apart.offers:
        candidates.append(contestant("heads measured apart", apart))
    parts = ablations(plain, without, total)
    candidates += [contestant(name, part) for name, part in parts.items()]
    candidates += simple_caches(config, total)
    judged = [(Contestant(FULL),), *((own,) for own in candidates)]
    full, *verdicts = stages.run("judged", judged, "judge")
    taken = min(range(len(candidates)), key=lambda i: verdicts[i].loss)
    curve = _curve(stages, config, plain, total, contestant)
    best = candidates[taken]
    report = {
        "budget": {
            "asked": budget,
            "bytes": total,
            "context": context,
            "full_cache_bytes": config.full_cache_bytes(context, "float16"),
        },
        "taken": best.name,
        "full": full.__dict__,
        "verdicts": [entry.__dict__ for entry in verdicts],
        "curve": curve,
        "predicted": {
            "heads measured apart": apart.loss,
            "no state": without.loss,
            "state": plan.loss,
        },
        "config": best.config.to_dict() if best.config else None,
        "losses": [entry.to_dict() for entry in losses],
        "factors": dataclasses.asdict(factors),
        "effort": chosen.to_dict(),
        "validation_tokens": text["validation"].numel(),
        "model_id": public_name(model_id),
        **surroundings(),
    }
    record = {
        "method": "less-cache tune",
        "bytes": total,
        "share": total / config.full_cache_bytes(context, "float16"),
        "taken": best.name,
        "validation": {
            "loss": verdicts[taken].loss,
            "full cache's loss": full.loss,
            "divergence": verdicts[taken].divergence,
            "tokens": text["validation"].numel(),
        },
        **({} if licence is None else {"license": licence}),
    }
    assert best.config is not None
    recipe = CacheRecipe(
        best.config,
        best.maps,
        best.transforms,
        model=description(model.config) | ({} if model_id is None else {"name": model_id}),
        record=record,
    )
    recipe.save_pretrained(folder)
    return Tuned(recipe, report)


def measure_layers(
    model: Any,
    tokens: Tensor,
    work: str | Path,
    layers: Sequence[int],
    *,
    effort: Effort | None = None,
    minutes: float | None = None,
    policies: Sequence[Policy] = POLICIES,
    ranks: Sequence[int] = RANKS,
    model_id: str | None = None,
    progress: bool = True,
    device: str | None = None,
) -> list[int]:
    """Measure what the heads of some layers lose, for a `tune` with the same arguments.

    It is most of a tuning's work, and layers need nothing of each other: machines that share a
    folder, but no cluster, may each measure some.

    Parameters
    ----------
    layers
        Which, counted from 0.
    model, tokens, work, effort, minutes, policies, ranks, model_id, progress, device
        As of `tune`.

    Returns
    -------
    list of int
        Layers that are still to be measured, here or elsewhere.

    Raises
    ------
    ValueError, TypeError
        As of `tune`; if there is no such layer.
    """
    work = check_path("work", work)
    check_model(model)
    config = _shapes(model, tokens, policies, ranks)
    for layer in layers:
        check_int("layers", layer, minimum=0, maximum=config.num_layers - 1)
    stages = _stages(
        model,
        tokens,
        config,
        work,
        work,
        effort=effort,
        minutes=minutes,
        policies=policies,
        ranks=ranks,
        model_id=model_id,
        progress=progress,
        on=None,
        device=device,
    )
    (bases,) = stages.run("calibrated", [()])
    stages.run("measured", [(i, policies, bases[i]) for i in layers], "measure")
    return [i for i in range(config.num_layers) if not stages.losses_path(i).exists()]


def _stages(
    model: Any,
    tokens: Tensor,
    config: CacheConfig,
    work: Path,
    own: Path,
    *,
    effort: Effort | None,
    minutes: float | None,
    policies: Sequence[Policy],
    ranks: Sequence[int],
    model_id: str | None,
    progress: bool,
    on: Ray | None,
    device: str | None,
) -> Stages:
    """The folder of the work, once it is this run's."""
    if effort is not None and minutes is not None:
        raise ValueError("minutes: given, and effort too; leave one out")
    split(tokens, effort or Effort())
    chosen = _effort(model, tokens, config, effort, minutes, work, on, device)
    settings = {
        "model_id": public_name(model_id),
        "model_sha256": model_digest(model),
        "data_sha256": digest_tokens(tokens),
        # What is found before distillation serves any number of its steps.
        "effort": chosen.without_distillation(),
        "policies": [policy.to_dict() for policy in policies],
        "ranks": [*ranks],
    }
    claim(work, settings)
    return Stages(
        model,
        config,
        split(tokens, chosen),
        chosen,
        work,
        own=own,
        model_id=model_id,
        progress=progress,
        on=on,
        device=device,
    )


def _shapes(
    model: Any,
    tokens: Tensor,
    policies: Sequence[Policy],
    ranks: Sequence[int],
) -> CacheConfig:
    """The model's shapes, once what is to be tried has been looked at."""
    if not policies:
        raise ValueError("policies: got none, expected at least one")
    for policy in policies:
        if not isinstance(policy, Policy) or not policy.evicts:
            raise ValueError(f"policies: got {policy!r}, expected policies that evict")
    for rank in ranks:
        check_int("ranks", rank, minimum=1)
    if tokens.ndim != 2:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [n, N] token ids")
    config = CacheConfig.from_model(
        model.config,
        capacity=tokens.shape[1],
        policy=policies[0],
        rank=0,
        dtype=model.dtype,
    )
    check_fit(model, attention_modules(model), config)
    return config


def _effort(
    model: Any,
    tokens: Tensor,
    config: CacheConfig,
    asked: Effort | None,
    minutes: float | None,
    work: Path,
    on: Ray | None,
    device: str | None,
) -> Effort:
    """What was asked for, or fits into the time; if resumed, what was found the first time."""
    if asked is not None or minutes is None:
        return asked or Effort()
    path = work / "effort.json"
    if not path.exists():
        (seconds,) = run_tasks(seconds_per_pass, [()], shared=(model, tokens[:1], device), on=on)
        effort = effort_within(minutes, config.num_layers, seconds)
        # Of machines that measure layers side by side, the first one chooses for all.
        if not path.exists():
            write_text(path, json_text(effort.to_dict()) + "\n")
    return Effort(**parse_json(str(path), path.read_bytes()))


def _curve(
    stages: Stages, config: CacheConfig, offers: Any, total: int, contestant: Any
) -> list[dict[str, Any]]:
    """What other budgets give: the plan without states, and the best simple caches."""
    points = []
    for share in CURVE:
        bytes_ = int(total * share)
        try:
            tried = [contestant("no state", choose(offers, bytes_))]
        except ValueError:
            continue
        tried += simple_caches(config, bytes_)
        verdicts = stages.run("judged", [(own,) for own in tried])
        points += [{"bytes": bytes_, **verdict.__dict__} for verdict in verdicts]
    return points
