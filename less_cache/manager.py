"""`CacheManager`: the cache as a user meets it. Checks what comes in, and hands it to a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._checks import check_choice, check_int
from .backends import MODULES, get_backend, runs_on_triton
from .config import CacheConfig, LayerConfig, dtype_name
from .feature_maps import FeatureMaps, LayerMaps
from .policies import Score
from .snapshot import differences
from .state import CacheState, LayerState, allocate

Array = Any


class CacheManager:
    """Keeps a decoder's KV cache at a constant size, and what it evicts in a low-rank state.

    Parameters
    ----------
    config
        Shapes, budget and policy.
    maps
        φ and ψ of each layer; needed where ``config.rank`` is above 0, refused where it is 0.
    backend
        ``"auto"``, or one by name: ``"reference"`` is the definition, plain and slow;
        ``"torch"`` is fast on the CPU and on a GPU; ``"triton"`` has kernels for a CUDA GPU, and
        is what ``"auto"`` takes for a state that lives on one.

    Raises
    ------
    ValueError, TypeError
        If config, maps and backend do not go together.
    """

    def __init__(
        self, config: CacheConfig, maps: FeatureMaps | None = None, *, backend: str = "auto"
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a CacheConfig")
        check_choice("backend", backend, ("auto", *MODULES))
        # Which backend a state on a CUDA GPU gets, by its dtype, once it is known.
        self._on_cuda: dict[str, str] | None = {} if backend == "auto" else None
        if backend == "auto":
            custom = any(policy.score is Score.CUSTOM for policy in config.policies)
            backend = "reference" if custom else "torch"
        if maps is not None and not isinstance(maps, FeatureMaps):
            raise TypeError(f"maps: got {type(maps).__name__}, expected FeatureMaps")
        if config.rank and maps is None:
            raise ValueError(f"maps: got None, but rank = {config.rank} needs feature maps")
        if maps is not None and not config.rank:
            raise ValueError("maps: given, but rank = 0 has no low-rank state that would use them")
        if maps is not None:
            maps.check_against(config)
        self._backends = {backend: get_backend(backend)}
        self._backends[backend].check_config(config)
        self.config = config
        self.maps = maps
        self.backend = backend
        # By backend, device and dtype: states are made often, maps are converted once.
        self._prepared: dict[tuple[str, str, str], list[LayerMaps]] = {}

    def __repr__(self) -> str:
        return f"CacheManager({self.config}, {self.maps}, backend={self.backend!r})"

    def init(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> CacheState:
        """An empty cache for `batch_size` sequences.

        Parameters
        ----------
        batch_size
            B.
        device
            Where torch arrays live. Default: the CPU.
        dtype
            Of keys and values. A dtype of NumPy makes a NumPy state (reference backend only).
            Default: the config's.

        Raises
        ------
        ValueError, TypeError
            If the size is no positive integer, or the dtype not one that the backend takes.
        """
        check_int("batch_size", batch_size, minimum=1)
        numpy = isinstance(dtype, (type, np.dtype))
        config = self.config if dtype is None else self.config.with_dtype(dtype)
        if numpy and self.backend != "reference":
            raise ValueError(
                f"dtype: got NumPy's {dtype_name(dtype)}, which backend 'reference' alone takes; "
                f"this one is {self.backend!r}"
            )
        if numpy and device is not None:
            raise ValueError(f"device: got {device!r}, but NumPy arrays have none; leave it out")
        layers = [
            allocate(config.layer(i), batch_size, numpy=numpy, device=device)
            for i in range(config.num_layers)
        ]
        return self._adopt(CacheState(config, layers, self.maps))

    def append(
        self, state: CacheState, layer: int, q: Array, k: Array, v: Array, mask: Array | None = None
    ) -> Array:
        """Attend from S new tokens, and take them into the cache: the one operation.

        A prompt, a decode step, a chunk of a long prompt and a later turn are all this call.
        Each query attends over the pairs held, the new ones up to itself, and the low-rank state
        (the paper's equation 5)::

            out = (φ(q) H + Σ exp(q·k·scale) v) / (φ(q) z + Σ exp(q·k·scale))

        Parameters
        ----------
        state
            From `init`; changed in place.
        layer
            Which layer, from 0.
        q
            [B, Hq, S, D], S >= 1, after the rotary embedding, of the state's dtype and device.
        k, v
            [B, Hkv, S, D], k after the rotary embedding.
        mask
            [B, S], true or 1 at tokens, false or 0 at padding, which may stand anywhere.
            Padding never enters the cache, and its output is zero.

        Returns
        -------
        Array
            [B, Hq, S, D].

        Raises
        ------
        ValueError, TypeError
            If anything above is not so, or a `FullCache` has no room; the state is untouched then.
        """
        if not isinstance(state, CacheState):
            raise TypeError(f"state: got {type(state).__name__}, expected a CacheState from init()")
        if state.config is not self.config and state.config != self.config.with_dtype(
            state.config.dtype
        ):
            raise ValueError(
                f"state: made for another config: {differences(state.config, self.config)}"
            )
        if state.maps is not self.maps:
            raise ValueError("state: made with other feature maps than this manager's")
        backend = self._backend_for(state)
        if state.prepared_for != backend:
            self._adopt(state)
        spec = state.config.layer(layer)
        layer_state = state.layers[layer]
        _check_inputs(spec, layer_state, q, k, v)
        mask = _checked_mask(layer_state, k, mask)
        if spec.policy.score is Score.NONE:
            _check_room(spec, layer_state, mask, int(k.shape[2]))
        maps = state.layer_maps[layer]
        return self._backends[backend].append(spec, layer_state, maps, q, k, v, mask)

    def load(self, path: str | Path, *, device: Any = None) -> CacheState:
        """Read a snapshot that `CacheState.save` wrote, to go on with it.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or made with another config or other maps.
        """
        return self._adopt(CacheState.load(path, self.config, self.maps, device=device))

    def _adopt(self, state: CacheState) -> CacheState:
        if state.is_numpy and self.backend != "reference":
            raise ValueError(
                "state: holds NumPy arrays, which backend 'reference' alone takes; "
                f"this one is {self.backend!r}"
            )
        name = self._backend_for(state)
        backend = self._backends.setdefault(name, get_backend(name))
        backend.check_config(state.config)
        if self.maps is not None:
            first = state.layers[0].keys
            device = None if state.is_numpy else first.device
            key = (name, str(device), state.config.dtype)
            if key not in self._prepared:
                self._prepared[key] = [
                    backend.prepare_maps(maps, state.config.layer(i), device)
                    for i, maps in enumerate(self.maps)
                ]
            state.layer_maps = list(self._prepared[key])
        state.prepared_for = name
        return state

    def _backend_for(self, state: CacheState) -> str:
        """The backend that runs this state: "auto" prefers Triton's kernels on a CUDA GPU."""
        if self._on_cuda is None or state.is_numpy or not state.layers[0].keys.is_cuda:
            return self.backend
        dtype = state.config.dtype
        if dtype not in self._on_cuda:
            usable = self.backend == "torch" and runs_on_triton(state.config)
            self._on_cuda[dtype] = "triton" if usable else self.backend
        return self._on_cuda[dtype]


def _check_inputs(spec: LayerConfig, state: LayerState, q: Array, k: Array, v: Array) -> None:
    batch = state.keys.shape[0]
    library = np.ndarray if isinstance(state.keys, np.ndarray) else torch.Tensor
    for name, array, heads in (
        # First k: it says how many tokens are new.
        ("k", k, spec.kv_heads),
        ("q", q, spec.query_heads),
        ("v", v, spec.kv_heads),
    ):
        if not isinstance(array, library):
            raise TypeError(
                f"{name}: got {type(array).__name__}, but the state's arrays are {library.__name__}"
            )
        if array.ndim != 4:
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}, expected [batch, heads, tokens, head_dim]"
            )
        expected = (batch, heads, k.shape[2], spec.head_dim)
        if tuple(array.shape) != expected:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected {expected}")
        if array.dtype != state.keys.dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {state.keys.dtype}")
        if not isinstance(array, np.ndarray) and array.device != state.keys.device:
            raise ValueError(f"{name}: on device {array.device}, expected {state.keys.device}")
    if k.shape[2] == 0:
        raise ValueError("k: got 0 tokens, expected at least 1")


def _checked_mask(state: LayerState, k: Array, mask: Array | None) -> Array | None:
    if mask is None:
        return None
    numpy = isinstance(k, np.ndarray)
    if not isinstance(mask, np.ndarray if numpy else torch.Tensor):
        expected = "ndarray" if numpy else "Tensor"
        raise TypeError(f"mask: got {type(mask).__name__}, expected {expected}")
    expected_shape = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected_shape:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected [batch, tokens] = {expected_shape}"
        )
    if not numpy and mask.device != k.device:
        raise ValueError(f"mask: on device {mask.device}, expected {k.device}")
    if mask.dtype in (bool, torch.bool):
        return mask
    kinds: Any = mask.dtype
    integer = kinds.kind in "iu" if numpy else not (kinds.is_floating_point or kinds.is_complex)
    if not integer:
        raise TypeError(
            f"mask: got dtype {mask.dtype} (it could hold NaN), expected booleans or 0 and 1"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"mask: got values {mask.min()} to {mask.max()}, expected only 0 and 1")
    return mask != 0


def _check_room(spec: LayerConfig, state: LayerState, mask: Array | None, new_tokens: int) -> None:
    """Refuse tokens that a full cache cannot take, asking the device only when it may matter."""
    if not isinstance(state.length, np.ndarray) and torch.compiler.is_compiling():
        incoming = new_tokens if mask is None else mask.sum(1)
        torch._assert_async(
            ((state.length + incoming) <= spec.capacity).all(),
            f"FullCache: more tokens than capacity = {spec.capacity}",
        )
        # Nobody counts while compiled: the next call that is not has to ask the device.
        state.tokens_bound = spec.capacity
        return
    if state.tokens_bound + new_tokens > spec.capacity:
        state.tokens_bound = int(state.length.max())
        incoming = new_tokens if mask is None else mask.sum(1)
        total = int((state.length + incoming).max())
        if total > spec.capacity:
            raise ValueError(
                f"k: {total} tokens in all, but {spec.policy} holds at most "
                f"capacity = {spec.capacity}"
            )
    state.tokens_bound += new_tokens
