"""`CacheManager`: the cache as a user meets it. A thin face over the step of `ops`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._checks import check_choice, check_device, check_int, check_memory
from .arrays import MAX_SHORT_TOKENS, MOST_ROWS, Array
from .backends import BACKENDS, best_backend, get_backend
from .call import check_room, check_tokens, checked_mask, no_room
from .config import CacheConfig
from .dtypes import dtype_name
from .feature_maps import FeatureMaps
from .ops import StepPlan, ready_step
from .quantization.transforms import LayerTransforms, Transforms
from .recipe import CacheRecipe, check_parts
from .snapshot import differences
from .state import CacheState, LayerState, allocate


@dataclass(frozen=True)
class _Plan:
    """What a manager has made ready for the states of one device and dtype."""

    manager: CacheManager
    backend: str
    layers: tuple[StepPlan, ...]


class CacheManager:
    """Keeps a decoder's KV cache at a constant size, and what it evicts in a low-rank state.

    Parameters
    ----------
    config
        Shapes, budget and policy.
    maps
        φ and ψ of each layer whose rank is above 0, ``None`` for a layer of rank 0.
    backend
        ``"auto"``, or one by name: ``"reference"`` is the definition, plain and slow;
        ``"torch"`` is fast on the CPU and on a GPU; ``"triton"`` has kernels for a CUDA GPU, and
        is what ``"auto"`` takes for a state that lives on one; ``"inductor"`` compiles attention
        over coded pairs for a CPU, once for each layout, which takes a C++ compiler and a while.
    transforms
        The bases of codes of each layer that has calibrated ones, ``None`` for others.

    Raises
    ------
    ValueError, TypeError
        If config, maps and backend do not go together.

    Examples
    --------
    >>> import torch, less_cache as lc
    >>> config = lc.CacheConfig(1, 4, 2, 64, capacity=32, policy=lc.SinkWindow(), rank=0)
    >>> manager = lc.CacheManager(config)
    >>> state = manager.init(batch_size=3)
    >>> q, k, v = torch.randn(3, 4, 100, 64), torch.randn(3, 2, 100, 64), torch.randn(3, 2, 100, 64)
    >>> manager.attend(state, layer=0, q=q, k=k, v=v).shape
    torch.Size([3, 4, 100, 64])
    >>> state.length.tolist(), state.layers[0].keys.shape
    ([100, 100, 100], torch.Size([3, 64, 64]))
    """

    def __init__(
        self,
        config: CacheConfig,
        maps: FeatureMaps | None = None,
        *,
        backend: str = "auto",
        transforms: Transforms | None = None,
    ) -> None:
        check_choice("backend", backend, ("auto", *BACKENDS))
        check_parts(config, maps, transforms)
        if backend != "auto":
            get_backend(backend).check_config(config)
        self.config = config
        self.transforms = transforms
        self.maps = maps
        self.backend = backend
        # By device and dtype: states are made often, maps are converted once.
        self._plans: dict[tuple[str, str], _Plan] = {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        backend: str = "auto",
    ) -> CacheManager:
        """The manager of a cache that was saved as a `CacheRecipe`.

        Parameters
        ----------
        name, subfolder, revision
            As of `CacheRecipe.from_pretrained`.
        backend
            As above.
        """
        recipe = CacheRecipe.from_pretrained(name, subfolder=subfolder, revision=revision)
        return cls(recipe.config, recipe.maps, backend=backend, transforms=recipe.transforms)

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold modules, and are made again when a state asks for one.
        return {**vars(self), "_plans": {}}

    def __repr__(self) -> str:
        return f"CacheManager({self.config}, {self.maps}, backend={self.backend!r})"

    def backend_on(self, device: str = "cpu") -> str:
        """The name of the backend that states on a device get.

        Parameters
        ----------
        device
            ``"cpu"``, ``"cuda"``, ..., or ``"numpy"``.

        Raises
        ------
        TypeError, ValueError
            If it is no text, or no backend has arrays there.
        """
        if not isinstance(device, str):
            raise TypeError(f"device: got {device!r}, expected a text such as 'cpu' or 'cuda'")
        if self.backend != "auto":
            return self.backend
        return best_backend(self.config, device.partition(":")[0])

    def transforms_of(self, layer: int) -> LayerTransforms | None:
        """The calibrated bases of one layer's codes; ``None`` where there are none."""
        return None if self.transforms is None else self.transforms[layer]

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
            If the size is no positive integer or more than there is memory for, the dtype not one
            that the backend takes, or there is no such device.
        """
        check_int("batch_size", batch_size, minimum=1, maximum=MOST_ROWS)
        numpy = isinstance(dtype, (type, np.dtype))
        config = self.config if dtype is None else self.config.with_dtype(dtype)
        if numpy and self.backend != "auto" and "numpy" not in BACKENDS[self.backend].devices:
            raise ValueError(
                f"dtype: got NumPy's {dtype_name(dtype)}, which backend 'reference' alone takes; "
                f"this one is {self.backend!r}"
            )
        if numpy and device is not None:
            raise ValueError(f"device: got {device!r}, but NumPy arrays have none; leave it out")
        if device is not None:
            device = check_device("device", device)
        where = torch.device("cpu") if numpy else device or torch.get_default_device()
        check_memory("batch_size", batch_size, batch_size * config.bytes_per_sequence(), where)
        layers = [allocate(x, batch_size, numpy=numpy, device=device) for x in config.layers]
        state = CacheState(config, layers, self.maps, transforms=self.transforms)
        state.plan = self._plan_for(state)
        return state

    def attend(
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
            If anything above is not so, or a sequence would come to more tokens than its policy
            takes in all (`FullCache` as many as its slots, `H2O` 2^24 in float32, coded slots with
            positions of 16 bits `MAX_SHORT_TOKENS`, others `MAX_TOKENS`); the state is untouched
            then. A compiled call looks at `FullCache` and positions of 16 bits alone.
        RuntimeError
            If another call on the same state has not ended: a state belongs to one thread at a
            time. Threads may share a manager, each with a state of its own. A compiled call does
            not look.
        """
        if not isinstance(state, CacheState):
            raise TypeError(f"state: got {type(state).__name__}, expected a CacheState from init()")
        if torch.compiler.is_compiling():
            return self._attend(state, layer, q, k, v, mask)
        with state.turn():
            return self._attend(state, layer, q, k, v, mask)

    def _attend(
        self, state: CacheState, layer: int, q: Array, k: Array, v: Array, mask: Array | None
    ) -> Array:
        self.adopt(state)
        layers = state.plan.layers
        # A bool is an int, too, but names no layer.
        if type(layer) is not int or not 0 <= layer < len(layers):
            check_int("layer", layer, minimum=0, maximum=len(layers) - 1)
        plan, held = layers[layer], state.layers[layer]
        check_tokens(plan.layer, held.keys, len(held.length), q, k, v)
        if mask is not None:
            mask = checked_mask(k, mask)
        bound = _check_room(plan, held, mask, int(k.shape[2]))
        out = plan.run(held, q, k, v, held.length, mask=mask, clean=True)
        held.tokens_bound = bound
        held.length += k.shape[2] if mask is None else mask.sum(1, dtype=held.length.dtype)
        return out

    def load(self, path: str | Path, *, device: Any = None) -> CacheState:
        """Read a snapshot that `CacheState.save` wrote, to go on with it.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or made with another config or other maps.
        """
        state = CacheState.load(
            path, self.config, self.maps, device=device, transforms=self.transforms
        )
        state.plan = self._plan_for(state)
        return state

    def adopt(self, state: CacheState) -> None:
        """Check once that a state is one of this manager's kind, and make ready for it.

        Raises
        ------
        ValueError
            If it was made for another config, or with other maps or transforms.
        """
        if state.plan is not None and state.plan.manager is self:
            return
        if state.config is not self.config:
            wanted = self.config.with_dtype(state.config.dtype)
            if state.config != wanted:
                raise ValueError(
                    f"state: made for another config: {differences(state.config, wanted)}"
                )
        if state.maps is not self.maps:
            own = "" if self.maps is None else self.maps.digest
            if state.maps_digest != own:
                raise ValueError("state: made with other feature maps than this manager's")
        if state.transforms is not self.transforms:
            digests = [t.digest if t else "" for t in (state.transforms, self.transforms)]
            if digests[0] != digests[1]:
                raise ValueError("state: made with other transforms than this manager's")
        state.plan = self._plan_for(state)

    def _plan_for(self, state: CacheState) -> _Plan:
        config = state.config
        where = "numpy" if state.is_numpy else str(state.layers[0].keys.device)
        key = (where, config.dtype)
        if key in self._plans:
            return self._plans[key]
        kind = where.partition(":")[0]
        name = self.backend
        if name == "auto":
            name = best_backend(config, kind)
        if kind == "numpy" and "numpy" not in BACKENDS[name].devices:
            raise ValueError(
                "state: holds NumPy arrays, which backend 'reference' alone takes; "
                f"this one is {self.backend!r}"
            )
        get_backend(name).check_config(config)
        maps = self.maps if self.maps is not None else [None] * config.num_layers
        device = None if state.is_numpy else torch.device(where)
        layers = tuple(
            ready_step(layer, own, self.transforms_of(index), device, name)
            for index, (layer, own) in enumerate(zip(config.layers, maps, strict=True))
        )
        self._plans[key] = _Plan(self, name, layers)
        return self._plans[key]


def _check_room(plan: StepPlan, state: LayerState, mask: Array | None, new_tokens: int) -> int:
    """Refuse tokens that a cache cannot take, asking the device only when it may matter.

    Returns
    -------
    int
        `LayerState.tokens_bound` once it has taken them.
    """
    limit = plan.most_tokens
    if not isinstance(state.length, np.ndarray) and torch.compiler.is_compiling():
        if not plan.layer.policy.evicts or limit <= MAX_SHORT_TOKENS:
            incoming = new_tokens if mask is None else mask.sum(1)
            torch._assert_async(
                ((state.length + incoming) <= limit).all(),
                f"k: more tokens than {limit}: {no_room(plan.layer)}",
            )
        # Nobody counts while compiled: the next call that is not has to ask the device.
        return limit
    if state.tokens_bound + new_tokens > limit:
        length = state.length if isinstance(state.length, np.ndarray) else state.length.cpu()
        padding = mask if mask is None or isinstance(mask, np.ndarray) else mask.cpu()
        state.tokens_bound = int(length.max())
        check_room(plan.layer, length, padding, new_tokens)
    return state.tokens_bound + new_tokens
