"""The reference model's tokenizer: byte-level BPE, trained on the training documents alone."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from less_cache.reference_model.data import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    documents: Iterable[Document], vocabulary: int = VOCABULARY
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer.

    Parameters
    ----------
    documents : iterable of Document
        The text.
    vocabulary : int
        Number of tokens, the end-of-text token (number 0) included.

    Returns
    -------
    PreTrainedTokenizerFast
        The tokenizer, which reproduces any text exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
