"""The small Llama that ships with the package: trained on Python's standard library.

It is there so that the demo, the tests and the evaluation of cache policies need no download. Its
held-out documents are whole modules that it never saw.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from less_cache.reference_model.data import Document, held_out_documents, training_documents

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "less_cache reference model"
"""What maps for it call it."""

TUNED = Path(__file__).parent / "tuned"
"""Its caches, a folder a budget: `CacheRecipe.from_pretrained` reads them."""
ENDING = "-percent"
"""Of their folders' names: 5-percent, 2.5-percent."""

__all__ = [
    "NAME",
    "Document",
    "cache_folder",
    "held_out_documents",
    "load",
    "path",
    "training_documents",
    "tuned",
]


def path() -> Path:
    """Return the folder of the shipped model, in Hugging Face layout."""
    return Path(__file__).parent / "model"


def load(
    dtype: "torch.dtype | None" = None,
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Load the shipped model and its tokenizer.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Type of the weights; float32 by default. They are stored in bfloat16.

    Returns
    -------
    model : LlamaForCausalLM
        The model, in evaluation mode, on the CPU.
    tokenizer : PreTrainedTokenizerFast
        Its tokenizer, which adds no special tokens.
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(path(), dtype=dtype or torch.float32)
    model.train(False)
    return model, PreTrainedTokenizerFast.from_pretrained(path())


def tuned(budget: "str | float") -> Path:
    """Return the folder of a cache that was tuned for the shipped model.

    ``lc.attach(model, reference_model.tuned("5%"))`` runs the model with it.

    Parameters
    ----------
    budget : str or float
        Its bytes as a share of the full cache's in 16 bits at the model's longest context:
        ``"5%"``, or 0.05.

    Returns
    -------
    Path
        For `lc.attach`, `CacheManager.from_pretrained`, or ``less-cache eval --cache``.

    Raises
    ------
    TypeError
        If `budget` is no text and no number.
    ValueError
        If none ships for it; the error lists those that do.
    """
    if isinstance(budget, bool) or not isinstance(budget, (str, int, float)):
        raise TypeError(f"budget: got {budget!r}, expected a share such as '5%' or 0.05")
    there = {
        f"{folder.name.removesuffix(ENDING)}%": folder
        for folder in sorted(TUNED.glob(f"*{ENDING}"))
        if (folder / "less_cache.safetensors").is_file()
    }
    try:
        wanted = budget if str(budget).endswith("%") else f"{100 * float(budget):g}%"
    except ValueError:
        wanted = budget
    if wanted not in there:
        raise ValueError(
            f"budget: got {budget!r}, expected one that ships with the reference model: "
            f"{', '.join(there) or 'none does'}"
        )
    return there[str(wanted)]


def cache_folder(name: str) -> "str | Path":
    """Return the folder of ``reference:5%``, which is `tuned`'s; any other name as it is.

    Parameters
    ----------
    name : str
        A folder, a hub id, or such a name.

    Returns
    -------
    str or Path
        For `CacheRecipe.from_pretrained`.

    Raises
    ------
    ValueError
        If no such cache ships.
    """
    model, separator, budget = name.partition(":")
    return tuned(budget) if separator and model == "reference" else name
