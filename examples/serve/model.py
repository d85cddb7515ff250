"""What is served: an exported folder and its tokenizer; some are exported on first use."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

import less_cache as lc
from exporters.common.manifest import MANIFEST
from exporters.onnx import OnnxDecoder, export_decoder

SHIPPED = "less-cache-reference"
TOKENIZER = "tokenizer.json"
CHAT_SEPARATOR = "\n\n"
"""Between the messages of a chat with a model that has no chat template."""

TOKENIZING_THREADS = 2
"""Few, since each thread that allocates keeps some memory of its own."""

LONG = 16 * 1024
"""Characters from which on a request has to queue with others of its kind."""

Result = TypeVar("Result")


def shipped_folder() -> Path:
    """Export the shipped model with its H2O maps, unless an earlier start did; its folder.

    It lies in ``$XDG_CACHE_HOME/less_cache``, by default ``~/.cache/less_cache``.
    """
    # The maps may change with the version, so each has a folder of its own.
    folder = exports_folder() / f"{SHIPPED}-{lc.__version__}"
    if not (folder / MANIFEST).is_file():
        export_shipped(folder)
    return folder


def exports_folder() -> Path:
    """Where exports are kept from one start to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "less_cache"


def folder_with(cache: str, model: Path | None) -> Path:
    """Export a model with a whole cache, unless an earlier start did; its folder.

    Parameters
    ----------
    cache
        Folder or hub id of the cache, or ``reference:5%``: one that ships.
    model
        Folder or hub id of a transformers model with a fast tokenizer; ``None``: the shipped one.

    Raises
    ------
    ValueError
        If the model is an export, which has a cache of its own, or the cache is for another one.
    FileNotFoundError
        If there is no such cache.
    """
    from less_cache import reference_model
    from less_cache.integrations.introspection import description
    from less_cache.training.runs import model_digest

    if model is not None and (model / MANIFEST).is_file():
        raise ValueError(
            f"cache: got {cache!r}, but {model} was exported with its own; leave out --cache, or "
            "give the model that was exported"
        )
    recipe = lc.CacheRecipe.from_pretrained(reference_model.cache_folder(cache))
    decoder: Any
    tokenizer: Any
    if model is None:
        decoder, tokenizer = reference_model.load()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        decoder = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        decoder.train(False)
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    recipe.check_model(description(decoder.config))
    both = f"{model_digest(decoder)} {recipe.digest}"
    key = hashlib.sha256(both.encode()).hexdigest()[:12]
    name = SHIPPED if model is None else model.name
    folder = exports_folder() / f"{name}-{lc.__version__}-{key}"
    if not (folder / MANIFEST).is_file():
        export_decoder(
            decoder,
            recipe.config.with_dtype(decoder.dtype),
            recipe.maps,
            folder,
            tokenizer=tokenizer,
            transforms=recipe.transforms,
            force=True,
        )
    return folder


def export_shipped(folder: Path) -> None:
    """Export the shipped model with the maps for H2O at 5 % of its context."""
    from less_cache import reference_model
    from less_cache.reference_model.shipped_maps import shipped

    model, tokenizer = reference_model.load()
    maps = shipped("h2o", 0.05)
    config = lc.CacheConfig.from_model(
        model.config, capacity=0.05, policy=lc.H2O(), rank=maps.rank, dtype=model.dtype
    )
    export_decoder(model, config, maps, folder, tokenizer=tokenizer, force=True)


class ServedModel:
    """A decoder, its tokenizer, and what its folder says about both.

    Parameters
    ----------
    folder
        What ``less-cache export onnx`` wrote, with a fast tokenizer.
    name
        By which clients ask for it. Default: the folder's name.
    context
        Tokens of prompt and answer together. Default: the model's positions.
    threads
        Of one decode step. Default: one a core but one, which is left to the event loop.

    Raises
    ------
    FileNotFoundError
        If the folder lacks the export or the tokenizer.
    ValueError
        If the export is damaged, or the context does not fit it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.name = name or folder.name
        if threads is None:
            threads = max(1, (os.cpu_count() or 1) - 1)
        self.decoder = OnnxDecoder(folder, providers=["CPUExecutionProvider"], threads=threads)
        path = folder / TOKENIZER
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; export the model with its tokenizer")
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        self._threads = ThreadPoolExecutor(TOKENIZING_THREADS, "tokenizing")
        self._thread_of_long = ThreadPoolExecutor(1, "tokenizing-long")
        self.end_tokens = frozenset(self.decoder.manifest.eos_token_ids)
        self.context = self._context(context)
        self._template = _chat_template(folder)
        self._longest_token = _longest_token(self.tokenizer)

    @property
    def bytes_per_row(self) -> int:
        """Of one sequence's cache, at any length."""
        return self.decoder.manifest.bytes_per_sequence

    @property
    def full_cache_bytes_per_token(self) -> int:
        """What each token would add to a cache that forgets nothing."""
        return self.decoder.manifest.config.full_cache_bytes(1)

    @property
    def most_characters(self) -> int | None:
        """Texts that have more do not fit the context, whatever they say; ``None``: not known."""
        return None if self._longest_token is None else self._longest_token * self.context

    async def aside(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do a request's work, of `size` characters or bytes, without holding up the event loop.

        Long ones have a thread of their own, in which they wait for each other: so many that they
        take seconds do not keep a short one waiting.
        """
        pool = self._threads if size < LONG else self._thread_of_long
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with the special ones that the tokenizer begins texts with."""
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation's tokens.

        With the tokenizer's chat template, if it has one. Otherwise the messages' texts follow each
        other, separated by an empty line, and the model goes on where the last one ends.
        """
        if self._template is None:
            return self.encode(CHAT_SEPARATOR.join(message["content"] for message in messages))
        text = self._template.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        # A template writes the special tokens itself.
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _context(self, wanted: int | None) -> int:
        config = self.decoder.manifest.config
        full = [layer for layer in config.layers if not layer.policy.evicts]
        most = min((min(layer.capacities) for layer in full), default=None)
        if wanted is None:
            known = [n for n in (config.max_positions, most) if n is not None]
            if not known:
                raise ValueError("context: the export does not tell the model's positions; give it")
            return min(known)
        if wanted < 2 or (most is not None and wanted > most):
            allowed = "at least 2" if most is None else f"2 to {most}, the full cache's capacity"
            raise ValueError(f"context: got {wanted}, expected {allowed}")
        return wanted


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """Characters that a token stands for at most; ``None`` where it may be any number."""
    added = tokenizer.get_added_tokens_decoder().values()
    eats_blanks = any(token.lstrip or token.rstrip for token in added)
    # A token of the byte-level kind is written with a character a byte, and none is unknown.
    if tokenizer.normalizer or not isinstance(tokenizer.decoder, ByteLevel) or eats_blanks:
        return None
    return max(map(len, tokenizer.get_vocab()))


def _chat_template(folder: Path) -> Any:
    """The tokenizer as transformers has it, if it has a chat template."""
    path = folder / "tokenizer_config.json"
    told = path.is_file() and "chat_template" in json.loads(path.read_text(encoding="utf-8"))
    if not told and not (folder / "chat_template.jinja").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
