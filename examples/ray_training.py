"""Feature maps trained on a Ray cluster: here one of two workers on this machine.

    pip install less_cache[ray]
    python examples/ray_training.py

On the command line: ``less-cache train --ray auto --gpus 1 --device cuda ...``.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import less_cache as lc
from less_cache import reference_model
from less_cache.distributed import Ray
from less_cache.training import RECIPES, load_tokens, train


def main(out: Path, epochs: int = 2) -> lc.FeatureMaps | None:
    """Fit all layers, each a task; the same command goes on where this one was stopped."""
    model, tokenizer = reference_model.load()
    config = lc.CacheConfig.from_model(model.config, capacity=16, policy=lc.H2O(), rank=8)
    documents = [(d.name, d.text) for d in reference_model.held_out_documents()]
    tokens = load_tokens(documents, tokenizer, length=96, vocabulary=4096, sequences=16)
    recipe = dataclasses.replace(RECIPES["fast"], epochs=epochs)
    return train(model, tokens, config, recipe, out, on=Ray("local"), progress=False)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(Path(folder)))
