"""The caches of this library, and the full one, as entrants."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm
from transformers import DynamicCache, QuantizedCache

import less_cache as lc
from benchmarks.budgets import contestants
from less_cache.evaluation.perplexity import Contestant
from less_cache.tuning.judging import digest_of_cache

from .continuing import Entrant, cache_bytes, measure
from .protocol import SHARES, Plan, Results

FULL = "full cache"
TUNED = "less_cache, tuned"


def entries(
    model: Any, shares: Iterable[str] = SHARES
) -> Iterator[tuple[dict[str, Any], Contestant | None]]:
    """What is told of each cache, and the cache; ``None``: one of transformers' own."""
    yield {"name": FULL, "share": ""}, None
    for share in shares:
        for contestant in contestants(model, f"{share}%", ""):
            name = f"less_cache, {contestant.name}"
            told = {"name": name, "share": share, "digest": digest_of_cache(contestant)}
            yield told, contestant
    yield {"name": "QuantizedCache, float8", "share": ""}, None


def measure_ours(model: Any, plan: Plan, results: Results) -> None:
    """Measure whatever has no result yet."""
    found = [*entries(model, plan.budgets)]
    with tqdm(total=len(found) * len(plan.windows), desc="ours", unit="window") as bar:
        for number, (told, contestant) in enumerate(found):
            bar.set_postfix_str(f"{told['name']} {told['share']}")
            run = functools.partial(_measured, model, plan, told, contestant, bar.update)
            results.get(told, run)
            bar.update((number + 1) * len(plan.windows) - bar.n)


def _measured(
    model: Any,
    plan: Plan,
    told: dict[str, Any],
    contestant: Contestant | None,
    counted: Callable[[int], None],
) -> dict[str, Any]:
    name, share = told["name"], told["share"]

    def asked(opened: Any, nbytes: Callable[[Any, int], int], grows: bool) -> dict[str, Any]:
        return measure(
            model,
            plan.windows,
            Entrant(name, share, lambda: contextlib.nullcontext(opened), nbytes, grows),
            prompt=plan.prompt,
            new_tokens=plan.new_tokens,
            batch=plan.batch,
            told=counted,
        )

    if contestant is None:
        empty = DynamicCache if name == FULL else lambda: QuantizedCache("fp8", model.config)
        return asked(empty, cache_bytes, True)
    assert contestant.config is not None
    size = contestant.config.bytes_per_sequence("float16")
    with lc.attach(
        model, contestant.config, contestant.maps, transforms=contestant.transforms
    ) as handle:
        return asked(handle.new_cache, lambda *_: size, False)
