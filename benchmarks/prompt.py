"""Prompts with a small cache against the model's own, whole model, in one run on a CPU.

::

    python benchmarks/prompt.py                          # 2k and 8k tokens, batch 1 and 4
    python benchmarks/prompt.py --contexts 2k --batches 1 --threads 1

A Llama with random weights takes a prompt through `attach`, and without it through transformers'
own `DynamicCache` and PyTorch's fused attention. A few decode steps behind the prompt tell after
how many new tokens the small cache is ahead.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import less_cache as lc
from benchmarks.measuring import interleaved, surroundings
from benchmarks.options import numbers
from less_cache.policies import parse_policy

RESULTS = Path(__file__).parent / "results"
FULL = "full cache"
HIDDEN = 128
POLICIES = "sinkwindow keynorm:recent=1 observationwindow decayedh2o:factor=0.97 h2o"
TARGETS = {"SinkWindow": 1.10, "KeyNorm": 1.10, "ObservationWindow": 1.10, "H2O": 1.35}
"""A prompt's time by policy, at most, in full-cache prompts."""


def build_model(positions: int, tiny: bool) -> LlamaForCausalLM:
    """A random Llama: 4 layers of 512, 8 heads of 64; or a tiny one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512 if tiny else 8192,
        hidden_size=32 if tiny else 512,
        intermediate_size=64 if tiny else 1408,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=2 if tiny else 8,
        num_key_value_heads=2 if tiny else 8,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


class Contestant:
    """One cache: `prompt` takes the prompt, `step` one more token behind it."""

    def __init__(
        self, model: LlamaForCausalLM, policy: lc.Policy | None, rank: int, capacity: int
    ) -> None:
        self.model = model
        self.attachment: Any = None
        self.config = self.maps = None
        if policy is not None:
            self.config = lc.CacheConfig.from_model(
                model.config, capacity=capacity, policy=policy, rank=rank, dtype="float32"
            )
            self.maps = lc.FeatureMaps.initialise(self.config, hidden=HIDDEN) if rank else None
        self.cache: Any = None

    def attach(self) -> None:
        """Make the model run with this cache; it is on its own without a policy."""
        if self.config is not None:
            self.attachment = lc.attach(self.model, self.config, self.maps)

    def detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None

    @torch.no_grad()
    def prompt(self, ids: torch.Tensor) -> None:
        if self.attachment is None:
            self.cache = DynamicCache(config=self.model.config)
        else:
            self.cache = self.attachment.new_cache()
        self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> None:
        self.model(ids, past_key_values=self.cache, use_cache=True)


def measure(
    model: LlamaForCausalLM,
    context: int,
    batch: int,
    policies: list[lc.Policy],
    ranks: list[int],
    capacity: int,
    repeats: int,
    steps: int,
) -> list[dict[str, Any]]:
    """A row for the full cache and for each policy at each rank."""
    ids = torch.randint(model.config.vocab_size, (batch, context))
    one = ids[:, :1]
    contestants = {FULL: Contestant(model, None, 0, capacity)}
    for policy in policies:
        for rank in ranks:
            name = type(policy).__name__ + (f" + LESS, rank {rank}" if rank else "")
            contestants[name] = Contestant(model, policy, rank, capacity)
    prompts: dict[str, Callable[[], object]] = {
        name: lambda it=it: it.prompt(ids) for name, it in contestants.items()
    }

    def alone(chosen: Contestant) -> Callable[[], None]:
        """Attach one contestant, and no other, before its turn."""

        def change() -> None:
            for other in contestants.values():
                other.detach()
            chosen.attach()

        return change

    before = {name: alone(contestant) for name, contestant in contestants.items()}
    prompt_times = interleaved(prompts, repeats, before=before, warm_up=1)
    step_calls: dict[str, Callable[[], object]] = {
        name: lambda it=it: it.step(one) for name, it in contestants.items()
    }
    step_times = interleaved(step_calls, steps, before=before)
    for contestant in contestants.values():
        contestant.detach()
    rows = []
    for name in contestants:
        prompt, step = min(prompt_times[name]), min(step_times[name])
        full_prompt, full_step = min(prompt_times[FULL]), min(step_times[FULL])
        gain = full_step - step
        later = prompt - full_prompt
        rows.append(
            {
                "cache": name,
                "context": context,
                "batch": batch,
                "prompt_ms": prompt * 1e3,
                "ratio": prompt / full_prompt,
                "step_ms": step * 1e3,
                "break_even_tokens": 0
                if later <= 0
                else math.ceil(later / gain)
                if gain > 0
                else None,
            }
        )
    return rows


def main(
    contexts: Annotated[str, typer.Option(help="Tokens of the prompt.")] = "2k,8k",
    batches: Annotated[str, typer.Option(help="Sequences.")] = "1,4",
    policies: Annotated[str, typer.Option(help="With spaces between them.")] = POLICIES,
    ranks: Annotated[str, typer.Option(help="Of the low-rank state; 0: none.")] = "0,8",
    capacity: Annotated[int, typer.Option(min=2, help="Slots a head.")] = 410,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed prompts of each; the best counts.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps behind the prompt.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch's.")] = torch.get_num_threads(),
    tiny: Annotated[bool, typer.Option(help="A tiny model, to try the benchmark.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Results.")] = RESULTS / "prompt.json",
) -> None:
    """Measure prompts with small caches against the model's own."""
    torch.set_num_threads(threads)
    lengths = numbers(contexts)
    model = build_model(max(lengths) + steps + 8, tiny)
    around = surroundings()
    chosen = [parse_policy(text) for text in policies.split()]
    rows: list[dict[str, Any]] = []
    console = Console()
    cases = [(context, batch) for context in lengths for batch in numbers(batches)]
    for context, batch in track(cases, description="prompts", console=console):
        rows += measure(
            model,
            context,
            batch,
            chosen,
            [int(rank) for rank in ranks.split(",")],
            capacity,
            repeats,
            steps,
        )
    report = {
        "settings": {"capacity": capacity, "hidden": HIDDEN, "repeats": repeats, "steps": steps},
        "model": {"parameters": model.num_parameters()},
        **around,
        "results": rows,
    }
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(rows))


def table(rows: list[dict[str, Any]]) -> Table:
    """For the terminal; a ratio above its target is marked."""
    shown = Table(title="A prompt, in the full cache's prompts")
    for heading in ("context", "batch", "cache", "prompt ms", "ratio", "step ms", "ahead after"):
        shown.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in rows:
        target = TARGETS.get(row["cache"], math.inf)
        even = row["break_even_tokens"]
        shown.add_row(
            f"{row['context']:,}",
            str(row["batch"]),
            row["cache"],
            f"{row['prompt_ms']:,.0f}",
            f"{row['ratio']:.2f}" + (" (!)" if row["ratio"] > target else ""),
            f"{row['step_ms']:.1f}",
            "never" if even is None else f"{even:,} tokens",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
