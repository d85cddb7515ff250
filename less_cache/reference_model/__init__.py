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

__all__ = ["NAME", "Document", "held_out_documents", "load", "path", "training_documents"]


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
