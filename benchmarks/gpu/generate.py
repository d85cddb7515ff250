"""generate() with random weights in a 7B model's shapes: kernels compiled, and the host's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import less_cache as lc

from .scenes import write

LAYERS = 8
"""Of the model's 32: each costs the host the same."""


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that Triton looks for and does not find compiled in this process."""
    names: list[str] = []

    def noted(*arguments: Any, **given: Any) -> None:
        names.append(str(given.get("repr", arguments[:1])))

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_post_compile_hook = noted
        yield names


def model_of(layers: int, device: Any, **sizes: int) -> LlamaForCausalLM:
    """Llama-2-7B's shapes in fewer layers, random weights in fp16."""
    config = LlamaConfig(num_hidden_layers=layers, **sizes)
    with torch.device(device):
        return LlamaForCausalLM(config).half().eval()


def generated(
    model: LlamaForCausalLM, batch: int, prompt: int, new_tokens: int, capacity: int, hidden: int
) -> dict[str, Any]:
    """Kernels compiled while the first tokens come and after, and milliseconds of a token."""
    config = lc.CacheConfig.from_model(model.config, capacity=capacity, policy=lc.H2O(), rank=8)
    config = config.with_dtype(model.dtype)
    maps = lc.FeatureMaps.initialise(config, hidden=hidden)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=model.device)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), lc.attach(model, config, maps):
        with compilations() as first:
            model.generate(ids, max_new_tokens=4, **settings)
        with compilations() as later:
            torch.cuda.synchronize()
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=new_tokens, **settings)
            torch.cuda.synchronize()
            spent = time.perf_counter() - started
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            model.generate(ids, max_new_tokens=8, **settings)
            torch.cuda.synchronize()
    on_card = sum(event.self_device_time_total for event in profile.key_averages())
    return {
        "B": batch,
        "layers": model.config.num_hidden_layers,
        "compiled at first": len(first),
        "compiled later": len(later),
        "ms a token": 1e3 * spent / new_tokens,
        "us a token and layer": 1e6 * spent / new_tokens / model.config.num_hidden_layers,
        "us of the card a token and layer": on_card / 8 / model.config.num_hidden_layers,
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Results.")] = None,
) -> None:
    """Fail if a kernel is compiled after the first tokens."""
    model = model_of(LAYERS, "cuda")
    rows = [generated(model, batch, 512, 64, 205, 512) for batch in (1, 16)]
    write(json_file, rows)
    later = sum(row["compiled later"] for row in rows)
    if later:
        print(f"{later} kernels were compiled while tokens came")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
