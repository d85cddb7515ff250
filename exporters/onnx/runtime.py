"""`OnnxDecoder`: an exported folder, running."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from exporters.common.decoding import BatchDecoder
from exporters.common.manifest import MODEL, WEIGHTS, read_manifest

from .placement import Placement, check_providers
from .session import check_session, refuse_bfloat16
from .state import OnnxState, empty_state, read_state


class OnnxDecoder(BatchDecoder[OnnxState]):
    """A model that `export_decoder` wrote, with its cache.

    Parameters
    ----------
    folder
        What `export_decoder` wrote.
    providers
        ONNX Runtime's execution providers, as `onnxruntime.InferenceSession` takes them.
        Default: CUDA, if this build has it, then the CPU.
    threads
        How many threads one call uses. Default: ONNX Runtime's own choice, one a core.
    verify
        Compare the digest of every file with the manifest's; otherwise only the sizes.
    optimize
        Let ONNX Runtime rewrite the graph as it loads it.
    in_place
        Let a step write the new state over the old one, in the same memory.

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
        If a file is truncated or is another file, the model does not have the manifest's tensors,
        or this ONNX Runtime lacks a provider.
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
        manifest = read_manifest(folder, verify=verify)
        refuse_bfloat16(manifest)
        super().__init__(manifest, OnnxState)
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

    def __repr__(self) -> str:
        return f"OnnxDecoder({str(self.manifest.folder)!r}, {self.session.get_providers()})"

    def new_state(self, batch_size: int) -> OnnxState:
        """The state of `batch_size` sequences that have seen nothing.

        Raises
        ------
        TypeError, ValueError
            If `batch_size` is not a positive integer.
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
        return read_state(self.manifest, self.placement, Path(path))

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
            Logits [B, vocabulary] after each row's last token, in the model's dtype. Those of a
            row without tokens mean nothing. A model exported with ``all_logits`` gives those of
            all tokens, [B, S, vocabulary].

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described, or a `FullCache` has no room. The state is then
            unchanged.
        """
        ids, mask = self.checked(state, input_ids, attention_mask)
        new_tokens = ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        present: dict[str, ort.OrtValue] = {}
        spare = state.spare
        for spec in self.manifest.state:
            past = state.arrays[spec.name]
            binding.bind_ortvalue_input(f"past.{spec.name}", past)
            # A step's operators read all of an array before they write it; a chunk's do not. The
            # lengths are read by every layer.
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
