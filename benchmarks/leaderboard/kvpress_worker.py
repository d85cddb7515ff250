"""Measures kvpress's presses and transformers' quantised caches, in an environment of their own.

    .venv-kvpress/bin/python -m benchmarks.leaderboard.kvpress_worker PLAN.json

Nothing of `less_cache` is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache

from .continuing import Entrant, cache_bytes, measure
from .peers import HEADS, PAIR_BYTES, entries
from .protocol import Plan, Results

VERSIONS = ("kvpress", "transformers", "torch", "optimum-quanto")


def press_for(entry: dict[str, Any], prompt: int) -> Any:
    """The press of an entry, for prompts of so many tokens; ``None``: no press."""
    if "press" not in entry:
        return None
    # Cut down to this number whether a press rounds or cuts.
    ratio = 1 - (entry["pairs"] + 0.01) / prompt
    once = _press(entry["press"], ratio, entry["options"])
    if "interval" not in entry:
        return once
    later = kvpress.DecodingPress(
        base_press=_press(entry["press"], 0.0, entry["later"]),
        compression_interval=entry["interval"],
        target_size=entry["pairs"],
    )
    return kvpress.PrefillDecodingPress(prefilling_press=once, decoding_press=later)


def _press(name: str, ratio: float, options: dict[str, Any]) -> Any:
    outer, _, inner = name.rpartition(", ")
    press = getattr(kvpress, f"{inner}Press")(compression_ratio=ratio, **options)
    return getattr(kvpress, f"{outer}Press")(press) if outer else press


def entrant_for(entry: dict[str, Any], model: Any, prompt: int) -> Entrant:
    """What `measure` takes."""
    press = press_for(entry, prompt)

    def empty() -> Any:
        if "bits" in entry:
            return QuantizedCache("quanto", model.config, nbits=entry["bits"])
        return DynamicCache()

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[], Any]]:
        with contextlib.nullcontext() if press is None else press(model):
            yield empty

    def nbytes(cache: Any, sequences: int) -> int:
        return cache_bytes(cache, sequences) - _masked_bytes(model, sequences)

    return Entrant(
        entry["name"],
        entry["share"],
        opened,
        nbytes,
        grows="interval" not in entry,
        # optimum-quanto's tensors cannot.
        copies="bits" not in entry,
    )


def _masked_bytes(model: Any, sequences: int) -> int:
    """What AdaKV masks: it frees nothing, but is counted as if it did."""
    masked = 0
    for layer in model.model.layers:
        places = getattr(layer.self_attn, "masked_key_indices", None)
        masked += 0 if places is None else len(places[0])
    return masked * PAIR_BYTES // sequences


def main(plan_file: Path) -> None:
    """Measure whatever has no result yet."""
    torch.set_num_threads(1)
    plan = Plan.load(plan_file)
    results = Results(plan_file.parent / "results")
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    models = {
        attention: AutoModelForCausalLM.from_pretrained(
            plan.model, dtype=torch.float32, attn_implementation=attention
        ).eval()
        for attention in ("sdpa", "eager")
    }
    found = [*entries(plan)]
    with tqdm(total=len(found) * len(plan.windows), desc="peers", unit="window") as bar:
        for number, entry in enumerate(found):
            # It alone wants the weights of attention, which the faster way does not have.
            eager = entry.get("press") == "ObservedAttention"
            model = models["eager" if eager else "sdpa"]
            assert model.config.num_hidden_layers * model.config.num_key_value_heads == HEADS
            bar.set_postfix_str(f"{entry['name']} {entry['share']}")

            def measured(entry: dict[str, Any] = entry, model: Any = model) -> dict[str, Any]:
                for layer in model.model.layers:
                    layer.self_attn.masked_key_indices = None
                own = measure(
                    model,
                    plan.windows,
                    entrant_for(entry, model, plan.prompt),
                    prompt=plan.prompt,
                    new_tokens=plan.new_tokens,
                    batch=plan.batch,
                    told=bar.update,
                )
                return {**own, "versions": versions}

            results.get(entry, measured)
            bar.update((number + 1) * len(plan.windows) - bar.n)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
