"""The step over plain tensors that anybody may own, and as `torch.library` operators.

`plan_step` says once what a layer is; `step` is then called for new tokens. `less_cache::step_` is
the same as an operator that changes the arrays in place: what ``torch.compile`` sees. The operator
`less_cache::step` has no side effects, and is what ``torch.export`` sees.
"""

from __future__ import annotations

import functools
import itertools
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import call
from ._checks import check_choice, check_device, check_int
from ._precision import without_autocast
from .arrays import Array, LayerArrays, array_shapes
from .backends import BACKENDS, Backend, PreparedMaps, best_backend, get_backend
from .config import CacheConfig
from .layer_config import LayerConfig
from .layer_maps import FIRST_LAYERS, LAST_LAYERS, LayerMaps
from .policies import policy_from_dict
from .quantization import Quantization
from .quantization.transforms import LayerTransforms, layer_transforms

FOLDED_BIAS = "psi_b1"
"""What `LayerTransforms.fold` adds to a layer's maps where its keys have a mean."""

_PLANS: weakref.WeakValueDictionary[int, StepPlan] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class StepPlan:
    """All that steps of one layer have in common: shapes, backend, maps and bases made ready.

    Attributes
    ----------
    layer : LayerConfig
    backend : str
    most_tokens : int
        That a sequence may have in all.
    """

    def __init__(
        self,
        layer: LayerConfig,
        backend: str,
        maps: PreparedMaps | None,
        transforms: LayerTransforms | None = None,
    ) -> None:
        self.layer = layer
        self.transforms = transforms
        self.backend = backend
        self.module: Backend = get_backend(backend)
        self.maps = maps
        # Looked up once: each costs as much as a check of a call.
        self.most_tokens = call.most_tokens(layer)
        self._may_raise = layer.policy.custom
        # An operator takes numbers, but no objects.
        self.number = next(_NUMBERS)
        _PLANS[self.number] = self

    def run(
        self,
        arrays: LayerArrays,
        q: Array,
        k: Array,
        v: Array,
        lengths: Array,
        rows: Array | None = None,
        mask: Array | None = None,
        *,
        clean: bool = False,
    ) -> Array:
        """`Backend.attend` of what has been checked; one node where it is compiled."""
        if torch.compiler.is_compiling():
            state = [getattr(arrays, name) for name in array_shapes(self.layer)]
            return step_in_place(q, k, v, mask, lengths, rows, state, self.number, clean)
        undone = _undone_by_errors(arrays, rows) if self._may_raise else _NOTHING_TO_UNDO
        with without_autocast(q), undone:
            if self.transforms is not None:
                return self._run_inside(
                    self.transforms, arrays, q, k, v, lengths, rows, mask, clean
                )
            return self.module.attend(
                self.layer,
                arrays,
                self.maps,
                q,
                k,
                v,
                lengths=lengths,
                rows=rows,
                mask=mask,
                clean=clean,
            )

    def _run_inside(
        self,
        transforms: LayerTransforms,
        arrays: LayerArrays,
        q: Array,
        k: Array,
        v: Array,
        lengths: Array,
        rows: Array | None,
        mask: Array | None,
        clean: bool,
    ) -> Array:
        """The same in the basis of the codes."""
        numpy = not isinstance(q, Tensor)
        with torch.no_grad():
            outer = [torch.from_numpy(x) for x in (q, k, v)] if numpy else [q, k, v]
            inner: list[Array] = [*transforms.enter(*outer)]
            if numpy:
                inner = [None if x is None else x.numpy() for x in inner]
            *tokens, shift = inner
            out = self.module.attend(
                self.layer,
                arrays,
                self.maps,
                *tokens,
                lengths=lengths,
                rows=rows,
                mask=mask,
                clean=clean,
                shift=shift,
            )
            left = transforms.leave(torch.from_numpy(out) if numpy else out)
            if mask is not None:
                padding = ~(torch.from_numpy(mask) if numpy else mask)
                left = left.masked_fill(padding.view(len(padding), 1, -1, 1), 0)
            return left.numpy().astype(q.dtype) if numpy else left.to(q.dtype)


_NOTHING_TO_UNDO: AbstractContextManager[None] = nullcontext()


@contextmanager
def _undone_by_errors(arrays: LayerArrays, rows: Any) -> Iterator[None]:
    """Take back what was done where a user's own policy raises in the midst of a step."""
    own = slice(None) if rows is None else rows
    before = {name: _copy(array[own]) for name, array in arrays.named().items()}
    try:
        yield
    except BaseException:
        for name, array in arrays.named().items():
            array[own] = before[name]
        raise


def _copy(array: Array) -> Array:
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def plan_step(
    layer: LayerConfig,
    maps: LayerMaps | None = None,
    transforms: LayerTransforms | None = None,
    *,
    device: Any = "cpu",
    backend: str = "auto",
) -> StepPlan:
    """Make ready for `step` on one layer; do this once, not in every step.

    Parameters
    ----------
    layer
        ``config.layer(i)``, with the dtype that the arrays will have.
    maps
        The layer's φ and ψ, ``feature_maps[i]``, where its rank is above 0.
    transforms
        The bases of the layer's codes, ``transforms[i]``, where it has calibrated ones.
    device
        Where the arrays will be; ``"numpy"`` for NumPy's.
    backend
        As of `CacheManager`.

    Raises
    ------
    ValueError, TypeError
        If layer, maps, device and backend do not go together.
    """
    if not isinstance(layer, LayerConfig):
        raise TypeError(f"layer: got {type(layer).__name__}, expected CacheConfig.layer(i)")
    if maps is not None and not isinstance(maps, LayerMaps):
        raise TypeError(f"maps: got {type(maps).__name__}, expected FeatureMaps[i]")
    if (maps is None) != (layer.rank == 0):
        raise ValueError(
            f"maps: got {'none' if maps is None else 'some'}, but the layer's rank is {layer.rank}"
        )
    check_choice("backend", backend, ("auto", *BACKENDS))
    numpy = isinstance(device, str) and device == "numpy"
    where = None if numpy else check_device("device", device)
    config = _config_of(layer)
    if backend == "auto":
        backend = best_backend(config, "numpy" if where is None else where.type)
    get_backend(backend).check_config(config)
    return ready_step(layer, maps, transforms, where, backend)


def ready_step(
    layer: LayerConfig,
    maps: LayerMaps | None,
    transforms: LayerTransforms | None,
    where: torch.device | None,
    backend: str,
) -> StepPlan:
    """`plan_step` on a device, or with NumPy, for a backend that takes the layer's whole config."""
    transforms = layer_transforms(layer, transforms)
    prepared = None
    if maps is not None:
        if transforms is not None:
            maps = transforms.fold(maps)
        prepared = get_backend(backend).prepare_maps(maps, layer, where)
    if transforms is not None:
        transforms = transforms.to(where, getattr(torch, layer.score_dtype))
    return StepPlan(layer, backend, prepared, transforms)


def step(
    plan: StepPlan,
    arrays: LayerArrays,
    q: Array,
    k: Array,
    v: Array,
    *,
    lengths: Array,
    rows: Array | None = None,
    mask: Array | None = None,
    query_start_loc: Array | None = None,
    max_query_len: int | None = None,
) -> Array:
    """Attend from new tokens and take them in, over arrays that the caller owns.

    What `CacheManager.attend` does, for engines with a memory of their own: nothing is kept but
    what `arrays` hold, and `lengths` is never advanced. On a GPU nothing waits for the device.

    Parameters
    ----------
    plan
        From `plan_step`.
    arrays
        The layer's, changed in place; ``config.page(i).arrays(buffer)``, or from `empty_arrays`.
    q
        [B, Hq, S, D]; or packed: [T, Hq, D].
    k, v
        [B, Hkv, S, D]; or packed: [T, Hkv, D].
    lengths
        [B] int32 or int64, tokens seen before these. A row of length 0 counts as empty whatever
        bytes it holds. With the new ones they must not pass `StepPlan.most_tokens`, beyond which
        positions of 32 bits, or 16, would wrap (2^24 for `H2O`'s sums in float32): a CPU looks, on
        a GPU it is the caller's to see to.
    rows
        [B] int32 or int64: sequence i lives in row ``rows[i]`` of the arrays. ``None``: in row i.
        Padded calls may name one spare row many times; what it holds then is anything. The numbers
        are not checked on a GPU.
    mask
        [B, S], true or 1 at tokens; not for packed sequences.
    query_start_loc
        [B + 1] int32 or int64: sequence i has the tokens from ``query_start_loc[i]`` to
        ``query_start_loc[i + 1]``, which may be none.
    max_query_len
        No packed sequence is longer: what a GPU pads to, since nobody reads there how long they
        are. Default: T.

    Returns
    -------
    Array
        As `q`; zero at padding.

    Raises
    ------
    ValueError, TypeError
        If anything above is not so; nothing has changed then.

    Examples
    --------
    >>> import torch, less_cache as lc
    >>> config = lc.CacheConfig(1, 4, 2, 64, capacity=32, policy=lc.SinkWindow(), rank=0)
    >>> plan = lc.plan_step(config.layer(0))
    >>> pool = lc.empty_arrays(config.layer(0), 100)  # of a hundred sequences
    >>> q, k, v = torch.randn(3, 4, 1, 64), torch.randn(3, 2, 1, 64), torch.randn(3, 2, 1, 64)
    >>> rows, lengths = torch.tensor([7, 0, 42]), torch.tensor([0, 0, 0])
    >>> lc.step(plan, pool, q, k, v, lengths=lengths, rows=rows).shape
    torch.Size([3, 4, 1, 64])
    """
    if not isinstance(plan, StepPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected one of plan_step()")
    call.check_arrays(plan.layer, arrays)
    call.check_pool(arrays, lengths, rows)
    if rows is None and len(lengths) < len(arrays.keys):
        arrays = LayerArrays(**{n: x[: len(lengths)] for n, x in arrays.named().items()})
    run = functools.partial(plan.run, arrays)
    if query_start_loc is None:
        call.check_tokens(plan.layer, arrays.keys, len(lengths), q, k, v)
        checked = call.checked_mask(k, mask)
        call.check_room(plan.layer, lengths, checked, k.shape[2])
        return run(q, k, v, lengths, rows, checked)
    if mask is not None:
        raise ValueError("mask: given with query_start_loc, but packed sequences have no padding")
    if max_query_len is not None:
        check_int("max_query_len", max_query_len, minimum=1)
    call.check_packed(plan.layer, arrays.keys, lengths, q, k, v, query_start_loc)
    return call.run_packed(
        run,
        q,
        k,
        v,
        lengths=lengths,
        rows=rows,
        query_start_loc=query_start_loc,
        max_query_len=max_query_len,
    )


def _config_of(layer: LayerConfig) -> CacheConfig:
    """A config of one such layer, for a backend to look at; capacities do not matter to it."""
    return CacheConfig(
        num_layers=1,
        query_heads=layer.query_heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        capacity=max(layer.capacities),
        policy=layer.policy,
        rank=layer.rank,
        dtype=layer.dtype,
        state_dtype=layer.state_dtype,
        quantization=layer.quantization,
    )


def state_names(layer: LayerConfig) -> tuple[str, ...]:
    """The arrays that `layer`'s state consists of, lengths aside: those that hold anything.

    Without a low-rank state there is no H and no z; a history only where the policy keeps one.
    """
    names = ["keys", "values", *(["scores"] if layer.keeps_scores else []), "positions"]
    if layer.policy.history_window:
        names.append("history")
    if layer.quantization is not None:
        names += ["key_scales", "value_scales"]
    if layer.rank:
        names += ["H", "z"]
    return tuple(names)


def map_names(kind: str | None) -> tuple[str, ...]:
    """The feature maps' parameters, in the order in which the operators take them."""
    return () if kind is None else (*FIRST_LAYERS, *LAST_LAYERS[kind])


def layer_spec(layer: LayerConfig, kind: str | None) -> str:
    """`layer` and its maps' kind as one string, which an operator may take and a graph may hold."""
    fields = {
        name: getattr(layer, name)
        for name in LayerConfig.__dataclass_fields__
        if name != "policies"
    }
    if layer.quantization is not None:
        fields["quantization"] = layer.quantization.to_dict()
    policies = [policy.to_dict() for policy in layer.policies]
    return json.dumps({**fields, "policies": policies, "kind": kind}, sort_keys=True)


@functools.cache
def read_spec(spec: str) -> tuple[LayerConfig, str | None]:
    """What `layer_spec` wrote."""
    fields: dict[str, Any] = json.loads(spec)
    kind = fields.pop("kind")
    fields["policies"] = tuple(policy_from_dict(policy) for policy in fields["policies"])
    fields["capacities"] = tuple(fields["capacities"])
    if fields["quantization"] is not None:
        fields["quantization"] = Quantization.from_dict(fields["quantization"])
    return LayerConfig(**fields), kind


def make_arrays(layer: LayerConfig, tensors: Sequence[Tensor]) -> LayerArrays:
    """`LayerArrays` of the tensors that `state_names` names; H and z of no rows at rank 0."""
    held: dict[str, Any] = dict(zip(state_names(layer), tensors, strict=True))
    if not layer.rank:
        wide = getattr(torch, layer.state_dtype)
        heads = (held["positions"].shape[0], layer.kv_heads)
        held["H"] = held["keys"].new_zeros((*heads, 0, layer.head_dim), dtype=wide)
        held["z"] = held["keys"].new_zeros((*heads, 0), dtype=wide)
    return LayerArrays(**held)


def make_maps(kind: str | None, tensors: Sequence[Tensor]) -> LayerMaps | None:
    """The maps that the tensors are the parameters of; ``None`` without a kind.

    Maps folded into a basis of codes have one parameter more, `FOLDED_BIAS`.
    """
    if kind is None:
        return None
    names = map_names(kind)
    if len(tensors) > len(names):
        names = (*names, FOLDED_BIAS)
    return LayerMaps(kind, dict(zip(names, tensors, strict=True)))


@torch.library.custom_op("less_cache::step", mutates_args=())
def functional_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    length: Tensor,
    state: list[Tensor],
    maps: list[Tensor],
    spec: str,
    shift: Tensor | None = None,
) -> list[Tensor]:
    """The step of heads of equal capacity C without side effects: a layer, or a run of its heads.

    The state is dense here, a slot axis [heads, C] in place of the flat one of `LayerArrays`:
    keys and values [B, Hkv, C, D]; scores, positions and history [B, Hkv, C]. So an exported
    file's tensors are. Of a quantised layer everything is in the basis of the codes.

    Parameters
    ----------
    q
        [B, Hq, S, D].
    k, v
        [B, Hkv, S, D].
    mask
        [B, S] int32, 0 at padding.
    length
        [B] int32, tokens seen before.
    state
        The arrays that `state_names` names, in that order.
    maps
        The parameters that `map_names` names, in that order.
    spec
        From `layer_spec`, of ``layer.runs[i].layer``.
    shift
        [B, Hq, S], added to the queries' products; ``None``: nothing.

    Returns
    -------
    list of Tensor
        The output [B, Hq, S, D], then the new state in the same order.

    Raises
    ------
    ValueError
        If the heads differ in capacity.
    """
    layer, kind = read_spec(spec)
    if not layer.is_uniform:
        raise ValueError(f"spec: capacities {layer.capacities}, expected those of one run of heads")
    copies = [array.clone(memory_format=torch.contiguous_format) for array in state]
    # Views, through which the step writes into the copies.
    flat = [
        array if name in ("H", "z") else array.flatten(1, 2)
        for name, array in zip(state_names(layer), copies, strict=True)
    ]
    module, read = get_backend("torch"), make_maps(kind, maps)
    prepared = None if read is None else module.prepare_maps(read, layer, q.device)
    arrays = make_arrays(layer, flat)
    with without_autocast(q):
        out = module.attend(
            layer, arrays, prepared, q, k, v, lengths=length, mask=mask != 0, shift=shift
        )
    return [out, *copies]


@functional_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    length: Tensor,
    state: list[Tensor],
    maps: list[Tensor],
    spec: str,
    shift: Tensor | None = None,
) -> list[Tensor]:
    return [torch.empty_like(q), *(torch.empty_like(array) for array in state)]


@torch.library.custom_op("less_cache::step_", mutates_args=("state",))
def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    rows: Tensor | None,
    state: list[Tensor],
    plan: int,
    clean: bool,
) -> Tensor:
    """The step of one layer over its arrays in place: one node of a compiled graph.

    Parameters
    ----------
    q, k, v, mask, lengths, rows, clean
        As of `Backend.attend`.
    state
        The layer's arrays, in the order of `arrays.array_shapes`.
    plan
        `StepPlan.number` of a plan that is kept.

    Returns
    -------
    Tensor
        [B, Hq, S, D].
    """
    held: dict[str, Any] = dict(zip(array_shapes(_PLANS[plan].layer), state, strict=True))
    arrays = LayerArrays(**held)
    return _PLANS[plan].run(arrays, q, k, v, lengths, rows, mask, clean=clean)


@step_in_place.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    rows: Tensor | None,
    state: list[Tensor],
    plan: int,
    clean: bool,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
