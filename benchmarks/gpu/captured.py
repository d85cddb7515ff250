"""A model's decode steps as CUDA graphs against the same launched one by one: logits and times."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import less_cache as lc

from .generate import LAYERS, model_of
from .scenes import POLICIES, write


def decoded(model: Any, ids: Tensor, new_tokens: int, cache: Any) -> tuple[Tensor, float]:
    """Logits [new_tokens + 1, B, vocabulary] of greedy tokens; seconds of one after two."""
    cache.reset()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    found, started = [logits[:, -1]], 0.0
    for turn in range(new_tokens):
        if turn == 2:
            _wait(ids.device)
            started = time.perf_counter()
        logits = model(found[-1].argmax(-1, keepdim=True), past_key_values=cache).logits
        found.append(logits[:, -1])
    _wait(ids.device)
    return torch.stack(found), (time.perf_counter() - started) / (new_tokens - 2)


def compared(
    model: Any,
    policy: lc.Policy,
    batch: int,
    *,
    capacity: int = 205,
    prompt: int = 512,
    new_tokens: int = 64,
    hidden: int = 512,
    rank: int = 8,
) -> dict[str, Any]:
    """Captured logits against the uncaptured, twice over one cache, and the times of both."""
    config = lc.CacheConfig.from_model(model.config, capacity=capacity, policy=policy, rank=rank)
    config = config.with_dtype(model.dtype)
    maps = lc.FeatureMaps.initialise(config, hidden=hidden) if rank else None
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(
        3, model.config.vocab_size, (batch, prompt), generator=generator, device=model.device
    )
    row: dict[str, Any] = {"policy": type(policy).__name__, "B": batch}
    results = {}
    with torch.no_grad():
        for name in ("uncaptured", "captured"):
            captures = name == "captured"
            with lc.attach(model, config, maps, "triton", cuda_graph=captures) as handle:
                cache = handle.new_cache()
                first, _ = decoded(model, ids, new_tokens, cache)
                second, spent = decoded(model, ids, new_tokens, cache)
            row[f"{name}, ms a token"] = 1e3 * spent
            results[name] = torch.stack([first, second])
    wanted, found = results["uncaptured"], results["captured"]
    row["greatest difference"] = float((wanted.float() - found.float()).abs().max())
    row["equal tokens"] = bool((wanted.argmax(-1) == found.argmax(-1)).all())
    return row


def wrong(row: dict[str, Any]) -> bool:
    """Whether a captured model says something else. The kernels are the same: so are their bits."""
    return not row["equal tokens"] or row["greatest difference"] != 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Fail if any logit differs."""
    model = model_of(LAYERS, "cuda")
    rows = [compared(model, policy, 1) for policy in POLICIES]
    rows += [compared(model, POLICIES[0], batch) for batch in (16, 64)]
    write(json_file, rows)
    if any(map(wrong, rows)):
        print("captured steps are not the uncaptured ones")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
