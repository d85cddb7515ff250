"""Models as the commands load them, and the configs for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._checks import check_device, check_memory
from ..config import CacheConfig
from ..dtypes import dtype_name
from ..policies import parse_policy
from ..quantization.transforms import check_transforms
from .options import SHIPPED, parse_capacity
from .quantized import Codes
from .telling import warn

if TYPE_CHECKING:
    from ..training.data import Document

logger = logging.getLogger(__name__)


def check_machine(device: str, dtype: str) -> None:
    """Refuse a device or a dtype that cannot be, before anything is loaded for it.

    Raises
    ------
    ValueError
        If torch cannot make a tensor there.
    """
    dtype_name(dtype)
    found = check_device("device", device)
    try:
        torch.empty(1, device=found).item()
    except Exception as error:  # Devices of other vendors miss modules, drivers, kernels.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {device!r}, which does not work here: {reason}") from None


def load_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model, ready to run, and its tokenizer; ``None`` where it has none.

    Raises
    ------
    ValueError
        If the model cannot be loaded.
    ImportError
        If transformers is missing.
    """
    kind = getattr(torch, dtype_name(dtype))
    logger.info("model: %s, %s on %s", name, dtype, device)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ImportError("model: needs transformers: install less_cache[transformers]") from None
    model: Any
    tokenizer: Any
    if name == SHIPPED:
        from ..reference_model import load

        model, tokenizer = load(dtype=kind)
        return model.to(device), tokenizer
    if not name:
        raise ValueError("model: got an empty name, expected a folder or a hub id")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except Exception as error:  # Network, hub, damaged files: whatever it is, the name led to it.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model: {name!r} cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception:
        # Enough for token ids; whoever needs it for text says so.
        tokenizer = None
    return model.train(False).to(device), tokenizer


def model_name(name: str) -> str:
    """What maps call the model: a hub id, or the name of a folder without the way to it."""
    if name == SHIPPED:
        from ..reference_model import NAME

        return NAME
    return Path(name).resolve().name if Path(name).exists() else name


def check_config(capacity: str, policy: str) -> None:
    """Refuse texts that are no capacity and no policy, before a model is loaded for them."""
    parse_capacity(capacity)
    parse_policy(policy)


def config_for(
    model: Any, capacity: str, policy: str, rank: int | Sequence[int], codes: Codes | None = None
) -> CacheConfig:
    """The config of a cache for a model, in its dtype.

    Raises
    ------
    ValueError
        If one sequence's cache is larger than the model's device, or the transforms are not for
        such a model.
    """
    codes = codes or Codes()
    config = CacheConfig.from_model(
        model.config,
        capacity=parse_capacity(capacity),
        policy=parse_policy(policy),
        rank=rank,
        dtype=model.dtype,
        quantization=codes.quantization,
    )
    check_transforms(config, codes.transforms)
    needed = config.bytes_per_sequence()
    check_memory("capacity, rank", f"{capacity}, {rank}", needed, model.device)
    return config


def length_for(config: CacheConfig, length: int | None) -> int:
    """Tokens a sequence: what was asked for, or the model's longest; longer ones are warned of.

    Raises
    ------
    ValueError
        If nothing was asked for and the model does not say.
    """
    length = config.max_positions if length is None else length
    if length is None:
        raise ValueError("length: needed, since the model's configuration names no length")
    if config.max_positions is not None and length > config.max_positions:
        warn(f"length: {length} is beyond the model's {config.max_positions} positions")
    return length


def vocabulary_of(model: Any) -> int:
    """The number of tokens that a model knows."""
    return int(model.config.get_text_config().vocab_size)


def tokens_for(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    config: CacheConfig,
    length: int | None,
    sequences: int | None,
) -> torch.Tensor:
    """The token ids [n, length] that a command's text is cut into.

    Parameters
    ----------
    model, tokenizer
        From `load_model`.
    documents
        From `read_documents`.
    config, length
        As of `length_for`.
    sequences
        How many; ``None``: all there are.
    """
    from ..training import load_tokens

    return load_tokens(
        documents,
        tokenizer,
        length=length_for(config, length),
        vocabulary=vocabulary_of(model),
        sequences=sequences,
    )


def held_out() -> list[tuple[str, str]]:
    """Names and texts of the modules that the shipped model never saw."""
    from ..reference_model import held_out_documents

    return [(document.name, document.text) for document in held_out_documents()]
