"""What every runtime of an exported model shares: generation, and the checks of its inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from less_cache.call import most_tokens, no_room

from .batch_state import BatchState
from .manifest import Manifest
from .sampling import GenerationStep, Sampler, generate_tokens

State = TypeVar("State", bound=BatchState)


class BatchDecoder(ABC, Generic[State]):
    """A model with its cache that takes tokens and gives logits.

    Parameters
    ----------
    manifest
        The model's.
    state_type
        The class of the states that `append` takes.
    """

    def __init__(self, manifest: Manifest, state_type: type[State]) -> None:
        self.manifest = manifest
        self._state_type = state_type
        self._tightest = min(manifest.config.layers, key=most_tokens)

    @abstractmethod
    def new_state(self, batch_size: int) -> State:
        """The state of `batch_size` sequences that have seen nothing."""

    @abstractmethod
    def load_state(self, path: str | Path) -> State:
        """Read a snapshot."""

    @abstractmethod
    def append(
        self, state: State, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Take S >= 1 new tokens of each sequence: a prompt, a step, a chunk or a later turn."""

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        state: State | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] | None = None,
        pad_token: int = 0,
    ) -> np.ndarray:
        """Continue each sequence until it ends or is long enough.

        Parameters
        ----------
        input_ids
            [B, S] prompts, or the tokens with which the sequences of `state` go on.
        attention_mask
            [B, S], 0 at padding.
        max_new_tokens
            The most tokens that a sequence gets.
        state
            Where to go on; it is changed. Afterwards it holds all tokens but the last, with which
            the next turn has to begin. Default: a new state.
        sampler
            How tokens are chosen. Default: the likeliest.
        stop_tokens
            Tokens that end a sequence. Default: the model's own, from the manifest.
        pad_token
            Fills up the rows of sequences that have ended.

        Returns
        -------
        numpy.ndarray
            [B, N] int64, the new tokens, the stop token included.

        Raises
        ------
        TypeError, ValueError
            If an argument is not of the kind described.
        """
        steps = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            state=state,
            sampler=sampler,
            stop_tokens=stop_tokens,
            pad_token=pad_token,
        )
        return np.stack([step.tokens for step in steps], axis=1)

    def stream(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        state: State | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] | None = None,
        pad_token: int = 0,
    ) -> Iterator[GenerationStep]:
        """Do what `generate` does, and yield each step as soon as it is there."""
        ids = np.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids: got shape {ids.shape}, expected [batch, tokens]")
        if stop_tokens is None:
            stop_tokens = self.manifest.eos_token_ids
        return generate_tokens(
            self,
            state if state is not None else self.new_state(ids.shape[0]),
            ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            sampler=sampler or Sampler(),
            stop_tokens=stop_tokens,
            pad_token=pad_token,
        )

    def checked(
        self, state: State, input_ids: Any, attention_mask: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check the arguments of `append`, and return tokens and mask as [B, S] int64.

        Raises
        ------
        TypeError, ValueError
            If the state belongs to another model, tokens or mask are of the wrong kind, or a
            `FullCache` has no room.
        """
        wanted = self._state_type.__name__
        if not isinstance(state, self._state_type):
            raise TypeError(f"state: got {type(state).__name__}, expected {wanted}")
        if state.manifest.data["files"] != self.manifest.data["files"]:
            raise ValueError("state: belongs to another exported model")
        ids = np.asarray(input_ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"input_ids: got dtype {ids.dtype}, expected integers")
        if ids.ndim != 2 or ids.shape[0] != state.batch_size or ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: got shape {ids.shape}, expected [{state.batch_size}, 1 or more]"
            )
        if attention_mask is None:
            attention_mask = np.ones(ids.shape, np.int64)
        mask = np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask: got shape {mask.shape}, expected that of input_ids, {ids.shape}"
            )
        if mask.dtype.kind not in "iub" or not np.isin(mask, (0, 1)).all():
            raise ValueError("attention_mask: got other values than 0 and 1")
        ids = np.where(mask, ids, 0)
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise ValueError(
                f"input_ids: got tokens {ids.min()} to {ids.max()}, "
                f"expected 0 to {self.manifest.vocab_size - 1}"
            )
        self._check_room(state, mask)
        return np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(mask, np.int64)

    def _check_room(self, state: State, mask: np.ndarray) -> None:
        """Refuse more tokens than some layer takes. Lengths are read only if need be."""
        room = most_tokens(self._tightest)
        if state.tokens_bound + mask.shape[1] <= room:
            return
        lengths = state.lengths()
        total = int((lengths + mask.sum(1, dtype=np.int64)).max())
        if total > room:
            raise ValueError(f"input_ids: {total} tokens in all, but {no_room(self._tightest)}")
        state.tokens_bound = int(lengths.max())
