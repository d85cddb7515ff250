"""The arrays of one layer's cache, whoever owns them, and the layout of a row of them in a page."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_device, check_int, check_memory
from .layer_config import LayerConfig, Run

Array = Any
"""A torch tensor, or a NumPy array where the state was made for NumPy."""

EMPTY = -1
"""The position of a slot that holds no pair."""

ARRAYS = (
    "keys",
    "values",
    "scores",
    "positions",
    "H",
    "z",
    "history",
    "key_scales",
    "value_scales",
)
"""What a layer's cache consists of, in this order; scores and the last three not always."""

PAIRS = ("keys", "values", "key_scales", "value_scales")
"""Those that hold pairs; the scales only of coded ones."""

MAX_TOKENS = 2**31 - 128
"""The most tokens that a sequence may have: positions are 32-bit numbers, and this, the largest
that float32 holds exactly, comes after every one of them."""

MAX_SHORT_TOKENS = 2**15
"""The same where positions are 16-bit numbers. Backends take the largest, too, for one that comes
after all others; the pair that has it is the last, and no other comes to evict it."""

MOST_ROWS = 2**31 - 1
"""Rows are counted with 32 bits."""

PAGE_ALIGNMENT = 16
"""Each array of a page begins at a multiple of so many bytes, and so does the next page."""


@dataclass
class LayerArrays:
    """What one layer's cache consists of. Backends rewrite the arrays in place.

    In a row that has seen tokens the values of empty slots are finite: `empty_arrays` makes them 0,
    and so does whatever takes the first tokens in. Backends may give them a weight of 0.

    The first axis counts the rows of a pool, P; a cache of a batch alone has P = B. N are the
    slots of all heads, one head's after another's. Any strides will do, but D is contiguous.

    Parameters
    ----------
    keys, values
        [P, N, D], keys after the rotary embedding; or codes, [P, N, bytes] uint8, as
        `LayerConfig.key_layout` and `value_layout` say.
    positions
        [P, N] int32 or int16, as `LayerConfig.position_dtype` says: each pair's place in its
        sequence, counted without padding; -1: empty.
    H
        [P, Hkv, R, D], Σ ψ(k)ᵀ v over what was evicted.
    z
        [P, Hkv, R], Σ ψ(k) over what was evicted.
    scores
        [P, N], what the policy holds of each pair; ``None`` where a coded pair's position tells it.
    history
        [P, N] int64, bits that `Scissorhands` keeps; ``None`` for other policies.
    key_scales, value_scales
        [P, N] float16, the codes' scales; ``None`` where pairs are stored as they are.
    """

    keys: Array
    values: Array
    positions: Array
    H: Array
    z: Array
    scores: Array | None = None
    history: Array | None = None
    key_scales: Array | None = None
    value_scales: Array | None = None
    # Views are asked for in every step, and cost as much as a small operator each.
    _views: dict[tuple[int, ...], tuple[list[Array], LayerArrays]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        # The copies of views would be no views of the copies.
        return {**vars(self), "_views": {}}

    def of_run(self, run: Run) -> LayerArrays:
        """The arrays of heads of equal capacity as dense views [P, heads, C, ...] of these."""
        key = (run.first, run.heads, run.offset, run.layer.slots)
        return self._kept(key, lambda: self._dense(run))

    def as_one_head(self) -> LayerArrays:
        """The slots of all heads as those of one, views [P, 1, N, ...]; H and z as they are."""
        return self._kept((), self._with_one_head)

    def _kept(self, key: tuple[int, ...], make: Callable[[], LayerArrays]) -> LayerArrays:
        own = [getattr(self, name) for name in ARRAYS]
        known, views = self._views.get(key, (None, None))
        if views is None or known is None or any(map(operator.is_not, known, own)):
            views = make()
            self._views[key] = (own, views)
        return views

    def _with_one_head(self) -> LayerArrays:
        slots = {
            name: array[:, None] for name, array in self.named().items() if name not in ("H", "z")
        }
        return LayerArrays(**slots, H=self.H, z=self.z)

    def _dense(self, run: Run) -> LayerArrays:
        shape = (-1, run.heads, run.layer.capacity)

        def dense(array: Array) -> Array:
            # A view, not a reshape: a copy would lose what is written to it.
            part = array[:, run.slots]
            if isinstance(array, np.ndarray):
                strides = part.strides
                split = (strides[0], strides[1] * shape[2], *strides[1:])
                sizes = (part.shape[0], *shape[1:], *part.shape[2:])
                return np.lib.stride_tricks.as_strided(part, sizes, split)
            return part.unflatten(1, shape[1:])

        return LayerArrays(
            keys=dense(self.keys),
            values=dense(self.values),
            positions=dense(self.positions),
            H=self.H[:, run.kv_heads],
            z=self.z[:, run.kv_heads],
            **{
                name: dense(array)
                for name in ("scores", "history", "key_scales", "value_scales")
                if (array := getattr(self, name)) is not None
            },
        )

    def named(self) -> dict[str, Array]:
        """The arrays by name, those that may be missing only where they are there."""
        found = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in found.items() if array is not None}


def array_shapes(layer: LayerConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of a row and dtype of each array of a layer, by name."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "keys": ((layer.slots, layer.head_dim), layer.dtype),
        "values": ((layer.slots, layer.head_dim), layer.dtype),
        "scores": ((layer.slots,), layer.score_dtype),
        "positions": ((layer.slots,), layer.position_dtype),
        "H": ((layer.kv_heads, layer.rank, layer.head_dim), layer.state_dtype),
        "z": ((layer.kv_heads, layer.rank), layer.state_dtype),
    }
    if not layer.keeps_scores:
        del shapes["scores"]
    if layer.policy.history_window:
        shapes["history"] = ((layer.slots,), "int64")
    if layer.key_layout is not None and layer.value_layout is not None:
        shapes["keys"] = ((layer.slots, layer.key_layout.nbytes), "uint8")
        shapes["values"] = ((layer.slots, layer.value_layout.nbytes), "uint8")
        shapes["key_scales"] = shapes["value_scales"] = ((layer.slots,), "float16")
    return shapes


def empty_arrays(
    layer: LayerConfig, rows: int, *, numpy: bool = False, device: Any = None
) -> LayerArrays:
    """Arrays of `rows` empty rows: zeros, and positions of -1.

    Parameters
    ----------
    layer
        Shapes and dtypes.
    rows
        P.
    numpy
        NumPy arrays instead of torch tensors.
    device
        Of torch tensors.

    Raises
    ------
    ValueError, TypeError
        If `rows` is no number of rows, the device has no room for them, or there is no such device.
    """
    if not isinstance(layer, LayerConfig):
        raise TypeError(f"layer: got {type(layer).__name__}, expected CacheConfig.layer(i)")
    check_int("rows", rows, minimum=0, maximum=MOST_ROWS)
    if device is not None:
        device = check_device("device", device)
    where = torch.device("cpu") if numpy else device or torch.get_default_device()
    check_memory("rows", rows, rows * layer.bytes_per_sequence, where)

    def filled(name: str, shape: Sequence[int], dtype: str) -> Array:
        value = EMPTY if name == "positions" else 0
        if numpy:
            return np.full((rows, *shape), value, dtype=dtype)
        with lasting():
            return torch.full((rows, *shape), value, dtype=getattr(torch, dtype), device=device)

    shapes = array_shapes(layer)
    return LayerArrays(**{name: filled(name, *shapes[name]) for name in shapes})


def lasting() -> AbstractContextManager[Any]:
    """A block whose new tensors may be written to later, in ``torch.inference_mode()`` or not."""
    entered = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if entered else nullcontext()


@dataclass(frozen=True)
class PageField:
    """One array of a row in a page.

    Parameters
    ----------
    name
        As `LayerArrays` has it.
    shape, dtype
        Of a row.
    offset, nbytes
        Where it begins in the page, and how long it is, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Page:
    """How one row of one layer lies in a buffer that an engine owns.

    Examples
    --------
    >>> import torch, less_cache as lc
    >>> config = lc.CacheConfig(1, 4, 2, 64, capacity=32, policy=lc.H2O(), rank=8)
    >>> page = config.page(0)
    >>> buffer = torch.empty(10, page.nbytes, dtype=torch.int8)  # ten rows
    >>> page.arrays(buffer).keys.shape
    torch.Size([10, 64, 64])
    """

    fields: tuple[PageField, ...]
    nbytes: int

    def __iter__(self) -> Iterator[PageField]:
        return iter(self.fields)

    def arrays(self, buffer: Tensor) -> LayerArrays:
        """The arrays of all rows of a buffer, as views of it.

        What the bytes are makes no difference to a row of length 0.

        Parameters
        ----------
        buffer
            [P, at least `nbytes`] int8 or uint8, its rows at multiples of `PAGE_ALIGNMENT` bytes.

        Raises
        ------
        TypeError, ValueError
            If it is not of that kind.
        """
        if not isinstance(buffer, Tensor) or buffer.dtype not in (torch.int8, torch.uint8):
            found = getattr(buffer, "dtype", type(buffer).__name__)
            raise TypeError(f"buffer: got {found}, expected a tensor of int8 or uint8")
        if buffer.ndim != 2 or buffer.shape[1] < self.nbytes or buffer.stride(1) != 1:
            raise ValueError(
                f"buffer: got shape {tuple(buffer.shape)} with strides {buffer.stride()}, expected "
                f"[rows, at least {self.nbytes}], each row in one piece"
            )
        if buffer.stride(0) % PAGE_ALIGNMENT or buffer.data_ptr() % PAGE_ALIGNMENT:
            raise ValueError(
                f"buffer: a row begins every {buffer.stride(0)} bytes from address "
                f"{buffer.data_ptr()}, expected multiples of {PAGE_ALIGNMENT}"
            )
        arrays = {}
        for entry in self.fields:
            part = buffer[:, entry.offset : entry.offset + entry.nbytes]
            dtype = getattr(torch, entry.dtype)
            # A field without numbers (rank 0) has no bytes to look at.
            whole = part.view(dtype) if entry.nbytes else part.new_empty(part.shape, dtype=dtype)
            arrays[entry.name] = whole.unflatten(1, entry.shape) if entry.shape else whole
        return LayerArrays(**arrays)


def page_of(layer: LayerConfig) -> Page:
    """The layout of a row of `layer` in one buffer."""
    fields, offset = [], 0
    for name, (shape, dtype) in array_shapes(layer).items():
        nbytes = math.prod(shape) * getattr(torch, dtype).itemsize
        fields.append(PageField(name, shape, dtype, offset, nbytes))
        offset += -(-nbytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
    return Page(tuple(fields), offset)
