"""Tune the caches that ship for the reference model.

The text is the Python code of the wheels that CPython bundles for its `ensurepip`: pip and
setuptools, which the model never saw. On text that a model has learned by heart a small cache
seems better than it is.

    python -m less_cache.reference_model.tuned_caches --out build/tuned
"""

import argparse
import hashlib
import sysconfig
import zipfile
from pathlib import Path

import torch

from less_cache import SinkWindow
from less_cache.evaluation.perplexity import cut_windows
from less_cache.reference_model import NAME, load
from less_cache.training.data import tokenize
from less_cache.tuning import Effort, save_report, tune

POLICIES = (SinkWindow(1),)
"""This model needs no more than one sink, and heads with a handful of slots have none to give away.
By the heads' own curves DecayedH2O would lose an eighth less, but as whole caches they lose alike,
and its scores cost longer steps and prompts."""
BUDGETS = ("5%", "2.5%", "1.25%")
SMALLEST, LARGEST = 12_000, 150_000
TABLES = ("freq.py", "model.py", "idnadata.py", "uts46data.py", "unistring.py", "package_data.py")
"""Ends of names of files that are tables rather than code."""
WINDOWS_A_DOCUMENT = 4


def tuning_documents() -> list[tuple[str, str]]:
    """Names and texts, in an order that mixes the packages and is the same everywhere."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "ensurepip" / "_bundled"
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                name = entry.filename
                fits = SMALLEST <= entry.file_size <= LARGEST
                if name.endswith(".py") and fits and not name.endswith(TABLES):
                    found.append((name, archive.read(name).decode("utf-8")))
    if not found:
        raise FileNotFoundError(f"{folder}: holds no wheels; this Python has none bundled")
    return sorted(found, key=lambda entry: hashlib.sha256(entry[0].encode()).digest())


def tuning_tokens(tokenizer: object, length: int, vocabulary: int) -> torch.Tensor:
    """[n, length] token ids: the first windows of each document."""
    windows = []
    for document in tokenize(tuning_documents(), tokenizer, vocabulary=vocabulary):
        if len(document[1]) >= length:
            windows += cut_windows([document], length)[:WINDOWS_A_DOCUMENT]
    return torch.stack([window.ids for window in windows])


def main() -> None:
    """Tune for every budget; the measurements are shared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder a budget goes here")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of training all layers together")
    options = parser.parse_args()
    model, tokenizer = load()
    shape = model.config
    tokens = tuning_tokens(tokenizer, shape.max_position_embeddings, shape.vocab_size)
    print(f"{len(tokens)} windows of {tokens.shape[1]} tokens")
    for budget in options.budgets:
        folder = options.out / budget.removesuffix("%")
        tuned = tune(
            model,
            tokens,
            budget,
            folder,
            work=options.out / "work",
            effort=Effort(steps=options.steps, batch=8),
            policies=POLICIES,
            model_id=NAME,
            licence="Apache-2.0",
        )
        save_report(tuned.report, folder)
        print(f"{budget}: {tuned.recipe}")


if __name__ == "__main__":
    main()
