"""`TensorRTDecoder`: a folder of engines, running."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor

from exporters.common.decoding import BatchDecoder
from exporters.common.snapshots import read_arrays

from .cuda import Device, device_info
from .engine import TORCH_TYPES, Call, Engine
from .files import PLUGIN_CODE_DTYPE, PROMPT_ENGINE, STEP_ENGINE, check_place, read_engine_manifest
from .library import Log, load_plugin
from .state import TensorRTState, empty_arrays, to_numpy


class TensorRTDecoder(BatchDecoder[TensorRTState]):
    """A model that `build_engines` built, with its cache.

    A step's state is bound in place, at addresses that never change, and from the second step of a
    batch size on the whole step is one CUDA graph. The decoder works on one state of each batch
    size at a time; going over to another one copies both.

    Parameters
    ----------
    folder
        What `build_engines` wrote.
    plugin
        The plugin's library. Default: the one that is in the folder.
    device
        The GPU's index.
    cuda_graph
        Capture steps as CUDA graphs.
    one_address
        Bind a past tensor and its present one to one address where the plugin takes the step, which
        is right whether the engine was built with aliasing or without. Otherwise to two, and copy
        the state back after each step.
    verify
        Compare the digest of every file with the manifest's; otherwise only the sizes.
    verbose
        Print all of TensorRT's messages.

    Attributes
    ----------
    manifest : exporters.common.manifest.Manifest
        The exported model's.
    engines : EngineManifest
        The folder's manifest.

    Raises
    ------
    FileNotFoundError
        If the folder, or a file that its manifest names, is missing.
    ValueError
        If a file is truncated or is another file, the engines are for another TensorRT or GPU, or
        they do not have the model's tensors.
    RuntimeError
        If there is no such GPU.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        plugin: str | Path | None = None,
        device: int = 0,
        cuda_graph: bool = True,
        one_address: bool = True,
        verify: bool = True,
        verbose: bool = False,
    ) -> None:
        self.engines = read_engine_manifest(folder, verify=verify)
        super().__init__(self.engines.model, TensorRTState)
        check_place(self.engines, trt.__version__, device_info(device))
        if self.engines.plugin is not None:
            own = self.engines.folder / self.engines.plugin
            load_plugin(Path(plugin) if plugin is not None else own)
        self.device = Device(device)
        self.cuda_graph = cuda_graph
        self._in_place = one_address and self.engines.plugin is not None
        log = Log(verbose)
        runtime = trt.Runtime(log)
        with self.device.active():
            self._step = Engine(runtime, log, self.engines.folder / STEP_ENGINE)
            self._prompt = Engine(runtime, log, self.engines.folder / PROMPT_ENGINE)
            plugged = self.engines.plugin is not None
            self._step.check(self.manifest, PLUGIN_CODE_DTYPE if plugged else "uint8")
            self._prompt.check(self.manifest)
            self._prompt_call = self._prompt.call()
        self._seats: dict[int, _Seat] = {}

    def __repr__(self) -> str:
        return f"TensorRTDecoder({str(self.engines.folder)!r})"

    def new_state(self, batch_size: int) -> TensorRTState:
        """The state of `batch_size` sequences that have seen nothing.

        Raises
        ------
        TypeError, ValueError
            If `batch_size` is not a positive integer, or more than the engines were built for.
        """
        arrays = empty_arrays(self.manifest, batch_size)
        self._check_batch(batch_size)
        return self._placed(arrays)

    def load_state(self, path: str | Path) -> TensorRTState:
        """Read a snapshot that any state of this model, of any runtime, was saved to.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or made with another config or other maps than this model's.
        """
        return self._placed(read_arrays(self.manifest, Path(path)))

    def append(
        self, state: TensorRTState, input_ids: np.ndarray, attention_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Take S >= 1 new tokens of each sequence: a prompt, a step, a chunk or a later turn.

        Parameters
        ----------
        state
            Of this model; changed.
        input_ids
            [B, S] integers; S at most the ``max_prompt`` of the engines.
        attention_mask
            [B, S], 1 at tokens and 0 at padding, which may stand anywhere. Default: no padding.

        Returns
        -------
        numpy.ndarray
            Logits [B, vocabulary] after each row's last token, in the model's dtype (bfloat16 as
            float32). Those of a row without tokens mean nothing. A model exported with
            ``all_logits`` gives those of all tokens, [B, S, vocabulary].

        Raises
        ------
        TypeError, ValueError
            If an argument is not as described, or a `FullCache` has no room. The state is then
            unchanged.
        RuntimeError
            If TensorRT cannot run the engine.
        """
        ids, mask = self.checked(state, input_ids, attention_mask)
        batch, new_tokens = ids.shape
        self._check_batch(batch)
        if new_tokens > self.engines.limits.max_prompt:
            raise ValueError(
                f"input_ids: got {new_tokens} tokens at once, but the engines were built for at "
                f"most {self.engines.limits.max_prompt}; append them in chunks"
            )
        with self.device.active():
            seat = self._seat(state)
            if new_tokens == 1:
                logits = seat.step(torch.from_numpy(ids), torch.from_numpy(mask))
            else:
                logits = self._take_prompt(seat, ids, mask)
            found = to_numpy(logits)
        state.tokens_bound += new_tokens
        return found.copy() if self.manifest.data["all_logits"] else found[:, 0].copy()

    def _take_prompt(self, seat: _Seat, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        tokens = {
            "input_ids": self.device.put(torch.from_numpy(ids)),
            "attention_mask": self.device.put(torch.from_numpy(mask)),
        }
        # A prompt reads all of the old state while it writes the new one.
        present = {
            name: self.device.empty(array.shape, array.dtype) for name, array in seat.arrays.items()
        }
        logits = self._logits(*ids.shape)
        self._prompt_call.bind(
            {**tokens, **_named("past", seat.arrays)},
            {"logits": logits, **_named("present", present)},
        )
        self._prompt_call.run(self.device.handle)
        for name, array in seat.arrays.items():
            array.copy_(present[name])
        return logits

    def _seat(self, state: TensorRTState) -> _Seat:
        """The buffers of the state's batch size, with the state in them."""
        batch = state.batch_size
        if batch not in self._seats:
            buffers = {
                spec.name: self.device.empty((batch, *spec.shape), TORCH_TYPES[spec.dtype])
                for spec in self.manifest.state
            }
            logits = self._logits(batch, 1)
            self._seats[batch] = _Seat(
                self.device, self._step.call(), buffers, logits, self._in_place, self.cuda_graph
            )
        self._seats[batch].seat(state)
        return self._seats[batch]

    def _logits(self, batch: int, tokens: int) -> Tensor:
        rows = tokens if self.manifest.data["all_logits"] else 1
        dtype = TORCH_TYPES[self.manifest.config.dtype]
        return self.device.empty((batch, rows, self.manifest.vocab_size), dtype)

    def _placed(self, arrays: dict[str, Tensor]) -> TensorRTState:
        with self.device.active():
            placed = {name: self.device.put(array) for name, array in arrays.items()}
        return TensorRTState(self.manifest, placed)

    def _check_batch(self, batch_size: int) -> None:
        most = self.engines.limits.max_batch
        if batch_size > most:
            raise ValueError(
                f"batch_size: got {batch_size}, but the engines were built for at most {most}"
            )


class _Seat:
    """Buffers of one batch size, at addresses that stay, and the step that works on them."""

    def __init__(
        self,
        device: Device,
        call: Call,
        arrays: dict[str, Tensor],
        logits: Tensor,
        in_place: bool,
        cuda_graph: bool,
    ) -> None:
        self.arrays, self.logits = arrays, logits
        self._device, self._call, self._cuda_graph = device, call, cuda_graph
        batch = len(arrays["length"])
        self._tokens = {
            name: device.empty((batch, 1), torch.int64) for name in ("input_ids", "attention_mask")
        }
        # Every layer reads the lengths, so the new ones need a place of their own. So does every
        # array where nothing works in place.
        self._apart = {
            name: device.empty(array.shape, array.dtype)
            for name, array in arrays.items()
            if name == "length" or not in_place
        }
        call.bind(
            {**self._tokens, **_named("past", arrays)},
            {"logits": logits, **_named("present", {**arrays, **self._apart})},
        )
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._seated: weakref.ref[TensorRTState] | None = None

    def seat(self, state: TensorRTState) -> None:
        """Move `state` into the buffers; the state that was there gets tensors of its own."""
        previous = self._seated() if self._seated is not None else None
        if previous is state:
            return
        if previous is not None:
            previous.arrays = {name: array.clone() for name, array in self.arrays.items()}
        for name, array in self.arrays.items():
            array.copy_(state.arrays[name])
        state.arrays = dict(self.arrays)
        self._seated = weakref.ref(state)

    def step(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits after one more token of each sequence."""
        self._tokens["input_ids"].copy_(ids)
        self._tokens["attention_mask"].copy_(mask)
        # TensorRT's guide: a context sets itself up in its first step, which cannot be captured.
        if self._cuda_graph and self._steps and self._replay is None:
            self._replay = self._device.capture(self._work)
        if self._replay is not None:
            self._replay()
        else:
            self._work()
        self._steps += 1
        return self.logits

    def _work(self) -> None:
        self._call.run(self._device.handle)
        for name, array in self._apart.items():
            self.arrays[name].copy_(array)


def _named(side: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{side}.{name}": array for name, array in arrays.items()}
