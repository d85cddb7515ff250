"""`OnnxDecoder`: an exported folder, running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from less_cache.policies import FullCache

from .manifest import MODEL, WEIGHTS, Manifest, check_session, read_manifest
from .placement import Placement, check_providers
from .sampling import GenerationStep, Sampler, generate_tokens
from .state import OnnxState, empty_state

__all__ = ["OnnxDecoder", "OnnxState"]


class OnnxDecoder:
    """A model that `export_decoder` wrote, with its cache.

    Parameters
    ----------
    folder
        What `export_decoder` wrote.
    providers
        ONNX Runtime's execution providers, as `onnxruntime.InferenceSession` takes them.
        Default: CUDA where this build has it, then the CPU.
    threads
        Of one call. Default: ONNX Runtime's own choice, one a core.
    verify
        Compare the digest of every file with the manifest's; otherwise only the sizes.
    optimize
        Let ONNX Runtime rewrite the graph as it loads it.
    in_place
        Let a step write the new state over the old one.

    Attributes
    ----------
    manifest : Manifest
        What the folder holds.
    session : onnxruntime.InferenceSession

    Raises
    ------
    FileNotFoundError
        If the folder, or a file that its manifest names, is missing.
    ValueError
        If a file is truncated or another one, the model does not have the manifest's tensors, or a
        provider is not there.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[Any] | None = None,
        *,
        threads: int | None = None,
        verify: bool = True,
        optimize: bool = True,
        in_place: bool = True,
    ) -> None:
        self.manifest: Manifest = read_manifest(folder, verify=verify)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = self.manifest.folder / MODEL
        try:
            self.session = ort.InferenceSession(
                str(path), options, providers=check_providers(providers)
            )
        except (ort.capi.onnxruntime_pybind11_state.Fail, RuntimeError) as error:
            raise ValueError(f"{path}, {WEIGHTS}: ONNX Runtime cannot load it: {error}") from None
        check_session(self.manifest, self.session.get_inputs(), self.session.get_outputs())
        self.placement = Placement.of(self.session)
        self.in_place = in_place
        policies = self.manifest.config.policies
        full = [isinstance(policy, FullCache) for policy in policies]
        capacities = self.manifest.config.capacities
        self._room = min((c for c, f in zip(capacities, full, strict=True) if f), default=None)

    def __repr__(self) -> str:
        return f"OnnxDecoder({str(self.manifest.folder)!r}, {self.session.get_providers()})"

    def new_state(self, batch_size: int) -> OnnxState:
        """The state of `batch_size` sequences that have seen nothing.

        Raises
        ------
        TypeError, ValueError
            If the size is no positive integer.
        """
        return empty_state(self.manifest, self.placement, batch_size)

    def load_state(self, path: str | Path) -> OnnxState:
        """Read a snapshot that `OnnxState.save` or `less_cache.CacheState.save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or made with another config or other maps than this model's.
        """
        from .snapshots import load_state

        return load_state(self.manifest, self.placement, Path(path))

    def append(
        self, state: OnnxState, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Take S >= 1 new tokens of each sequence: a prompt, a step, a chunk or a later turn.

        Parameters
        ----------
        state
            Of this model; changed.
        input_ids
            [B, S] integers.
        attention_mask
            [B, S], 1 at tokens and 0 at padding, which may stand anywhere. Default: no padding.

        Returns
        -------
        numpy.ndarray
            Logits [B, vocabulary] after each row's last token, in the model's dtype; of a row that
            has none, they mean nothing. Of a model exported with ``all_logits``, those of all
            tokens, [B, S, vocabulary].

        Raises
        ------
        TypeError, ValueError
            If anything above is not so, or a `FullCache` has no room; the state is untouched then.
        """
        ids, mask = self._checked(state, input_ids, attention_mask)
        new_tokens = ids.shape[1]
        self._check_room(state, mask)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        present: dict[str, ort.OrtValue] = {}
        spare = state.spare
        for spec in self.manifest.state:
            past = state.arrays[spec.name]
            binding.bind_ortvalue_input(f"past.{spec.name}", past)
            # Only a step's operators read all of an array before they write it; and every layer
            # reads the lengths.
            if self.in_place and new_tokens == 1 and spec.name != "length":
                present[spec.name] = past
            else:
                present[spec.name] = spare.pop(spec.name, None) or self.placement.empty(
                    past.shape(), spec.dtype
                )
            binding.bind_ortvalue_output(f"present.{spec.name}", present[spec.name])
        self.session.run_with_iobinding(binding)
        state.spare = {
            name: value
            for name, value in state.arrays.items()
            if present[name] is not value and (name == "length" or not self.in_place)
        }
        state.arrays = present
        state.tokens_bound += new_tokens
        logits = binding.get_outputs()[0].numpy()
        return logits if self.manifest.data["all_logits"] else logits[:, 0]

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        state: OnnxState | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] | None = None,
        pad_token: int = 0,
    ) -> np.ndarray:
        """Continue each sequence until it ends or is long enough.

        Parameters
        ----------
        input_ids
            [B, S] prompts, or what comes next of sequences that `state` holds.
        attention_mask
            [B, S], 0 at padding.
        max_new_tokens
            At most this many.
        state
            Goes on from here, and is changed; afterwards it holds all but the last token, which
            the next turn has to begin with. Default: a fresh one.
        sampler
            How tokens are chosen. Default: the likeliest.
        stop_tokens
            Tokens that end a sequence. Default: the model's own, as the manifest has them.
        pad_token
            What stands behind the end of a sequence.

        Returns
        -------
        numpy.ndarray
            [B, N] int64, the new tokens, the stop token included.

        Raises
        ------
        TypeError, ValueError
            If an argument is not so.
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
        state: OnnxState | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] | None = None,
        pad_token: int = 0,
    ) -> Iterator[GenerationStep]:
        """What `generate` does, token by token; see there."""
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

    def _checked(
        self, state: OnnxState, input_ids: Any, attention_mask: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(state, OnnxState):
            raise TypeError(f"state: got {type(state).__name__}, expected an OnnxState")
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
        return np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(mask, np.int64)

    def _check_room(self, state: OnnxState, mask: np.ndarray) -> None:
        """Refuse tokens that a full cache has no slots for, looking only when it may matter."""
        if self._room is None or state.tokens_bound + mask.shape[1] <= self._room:
            return
        lengths = state.lengths()
        total = int((lengths + mask.sum(1)).max())
        if total > self._room:
            raise ValueError(
                f"input_ids: {total} tokens in all, but FullCache holds at most {self._room}"
            )
        state.tokens_bound = int(lengths.max())
