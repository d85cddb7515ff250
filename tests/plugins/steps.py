"""A decode step as the plugin's node takes it, and what the float64 reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import less_cache as lc
from less_cache import ops
from less_cache.arrays import LayerArrays, empty_arrays
from less_cache.backends import reference
from less_cache.layer_config import LayerConfig
from less_cache.layer_maps import FIRST_LAYERS, LayerMaps
from less_cache.quantization.codes import encode_pairs
from less_cache.quantization.transforms import LayerTransforms, layer_transforms
from tests.conformance.cases import BackendCase
from tests.conformance.scenarios import CloseCall

DTYPES = {
    "float32": BackendCase("plugin", "triton", "float32", 2e-5, 5e-5),
    "float16": BackendCase("plugin", "triton", "float16", 1e-2, 1e-2),
    "bfloat16": BackendCase("plugin", "triton", "bfloat16", 6e-2, 6e-2),
}

NEAR = 1e-6
"""How far float32 may be off what decides on a code, relatively."""


@dataclass(frozen=True)
class Case:
    """One step: the layer, and the tokens before it (more than the capacity, or not)."""

    name: str
    config: lc.CacheConfig
    kind: str
    batch: int
    prompt: int
    seed: int


@dataclass(frozen=True)
class Step:
    """The node's inputs and outputs.

    Attributes
    ----------
    inputs
        By name and in order, in the node's types and shapes; codes as int8.
    out
        [B, Hq, 1, D] float64; zero where a row has no token.
    after
        The state's arrays after the step: floats in float64, each head's slots by position.
    """

    layer: LayerConfig
    kind: str | None
    batch: int
    inputs: dict[str, Tensor]
    out: np.ndarray
    after: dict[str, np.ndarray]

    @property
    def bounds(self) -> tuple[float, float]:
        """How far the output, and scores, H and z, may be off."""
        own = DTYPES[self.layer.dtype]
        # In the basis of codes numbers are counted in levels.
        size = 1.0 if self.layer.quantization is None else np.sqrt((self.out**2).mean())
        return own.outputs * max(1.0, float(size)), own.state


def taken(
    case: Case,
    maps: lc.FeatureMaps | None,
    tokens: list[np.ndarray],
    transforms: lc.Transforms | None = None,
) -> Step | None:
    """The last of `tokens`, taken by the reference; ``None`` for a close call.

    Parameters
    ----------
    case
        What is stepped.
    maps
        Of the layer; rounded to the model's dtype where the plugin reads them in it.
    tokens
        q, k, v [B, heads, prompt + 1, D].
    transforms
        Bases of calibrated codes.
    """
    layer = case.config.layer(0)
    wide = case.config.replace(dtype="float64", state_dtype=None).layer(0)
    basis = layer_transforms(wide, None if transforms is None else transforms[0])
    own = DTYPES[layer.dtype]
    rng = np.random.default_rng(case.seed)
    *qkv, shift = _entered(own, basis, tokens)
    kind = None if maps is None else case.kind
    folded = None if maps is None else _rounded_maps(maps[0], basis, layer.dtype)
    weights = None if folded is None else reference.prepare_maps(folded, wide, None)
    # Rows of unlike lengths, some of them empty; the last token is missing from some rows.
    mask = np.ones((case.batch, case.prompt), dtype=bool)
    present = np.ones((case.batch, 1), dtype=bool)
    if case.batch > 1:
        starts = rng.integers(0, case.prompt, size=case.batch)
        mask = np.arange(case.prompt)[None] >= starts[:, None]
        present = rng.random((case.batch, 1)) < 0.8
    arrays = empty_arrays(wide, case.batch, numpy=True)
    before = {"lengths": np.zeros(case.batch, np.int32), "mask": mask}
    early = None if shift is None else shift[:, :, :-1]
    reference.attend(wide, arrays, weights, *(x[:, :, :-1] for x in qkv), **before, shift=early)
    _round_state(own, arrays)

    lengths = mask.sum(1).astype(np.int32)
    qkv = [np.where(present[:, None, :, None], x[:, :, -1:], np.nan) for x in qkv]
    last = None if shift is None else np.where(present[:, None], shift[:, :, -1:], np.nan)
    inputs = _inputs(layer, kind, qkv, present, lengths, arrays, folded, last)
    close = CloseCall()
    with close.watch():
        out = reference.attend(
            wide, arrays, weights, *qkv, lengths=lengths, mask=present, shift=last
        )
    if close.met or _near_an_edge(wide, *(x[present[:, 0]] for x in qkv[1:])):
        return None
    out = np.where(present[:, None, :, None], out, 0.0)
    return Step(layer, kind, case.batch, inputs, out, by_position(layer, arrays.named()))


def by_position(layer: LayerConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state's arrays, each head's slots in order of position: [B, Hkv, C, ...]."""
    names = ops.state_names(layer)
    heads = (-1, layer.kv_heads, layer.capacity)
    order = np.argsort(arrays["positions"].reshape(heads), axis=2, kind="stable")
    found = {}
    for name in names:
        array = arrays[name]
        if name not in ("H", "z"):
            pairs = name in ("keys", "values")
            array = array.reshape(*order.shape, -1) if pairs else array.reshape(order.shape)
            array = np.take_along_axis(array, order[..., None] if pairs else order, 2)
        kinds = {"positions": np.int32, "f": np.float64}
        found[name] = array.astype(kinds.get(name, kinds.get(array.dtype.kind, array.dtype)))
    return found


def _entered(
    own: BackendCase, basis: LayerTransforms | None, tokens: list[np.ndarray]
) -> list[np.ndarray | None]:
    """q, k, v as the node gets them, in float64, and what is added to the queries' products."""
    if basis is None:
        return [*(own.rounded(array) for array in tokens), None]
    basis = basis.to(dtype=torch.float64)
    inner = basis.enter(*(torch.from_numpy(own.rounded(array)) for array in tokens))
    return [None if x is None else x.float().double().numpy() for x in inner]


def _rounded_maps(maps: LayerMaps, basis: LayerTransforms | None, dtype: str) -> LayerMaps:
    if basis is not None:
        maps = basis.fold(maps)
    narrow = {*FIRST_LAYERS, ops.FOLDED_BIAS}
    return LayerMaps(
        maps.kind,
        {
            name: tensor.to(getattr(torch, dtype)).float() if name in narrow else tensor
            for name, tensor in maps.tensors.items()
        },
    )


def _round_state(own: BackendCase, arrays: LayerArrays) -> None:
    for name, array in arrays.named().items():
        if array.dtype.kind == "f":
            plain = name in ("keys", "values")
            array[...] = own.rounded(array) if plain else array.astype(np.float32)


def _inputs(
    layer: LayerConfig,
    kind: str | None,
    qkv: list[np.ndarray],
    present: np.ndarray,
    lengths: np.ndarray,
    arrays: LayerArrays,
    maps: LayerMaps | None,
    shift: np.ndarray | None,
) -> dict[str, Tensor]:
    dtype = getattr(torch, layer.dtype)
    coded = layer.quantization is not None
    tokens = torch.float32 if coded else dtype
    found = {name: _tensor(x, tokens) for name, x in zip("qkv", qkv, strict=True)}
    found["mask"] = _tensor(present, torch.int32)
    found["length"] = _tensor(lengths, torch.int32)
    heads = (len(lengths), layer.kv_heads, layer.capacity)
    for name in ops.state_names(layer):
        array = getattr(arrays, name)
        if name in ("keys", "values"):
            value = _tensor(array, dtype) if not coded else _tensor(array).view(torch.int8)
        elif name in ("key_scales", "value_scales"):
            value = _tensor(array, torch.float16)
        else:
            kinds = {"positions": torch.int32, "history": torch.int64}
            value = _tensor(array, kinds.get(name, torch.float32))
        apart = name in ("H", "z")
        found[name] = value if apart else value.reshape(*heads, *value.shape[2:])
    if maps is None:
        return found
    narrow = {*FIRST_LAYERS, ops.FOLDED_BIAS}
    names = [*ops.map_names(kind), *([] if shift is None else [ops.FOLDED_BIAS])]
    for name in names:
        wanted = dtype if name in narrow else torch.float32
        found[name] = maps.tensors[name].to(wanted).contiguous()
    if shift is not None:
        found["shift"] = _tensor(shift, torch.float32)
    return found


def _tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
    # A copy: the reference changes its arrays in place.
    return torch.tensor(np.ascontiguousarray(array)).to(dtype).contiguous()


def _near_an_edge(layer: LayerConfig, k: np.ndarray, v: np.ndarray) -> bool:
    """Whether rounding in float32 could give the new pairs other codes or scales."""
    if layer.key_layout is None or layer.value_layout is None:
        return False
    middle, *sides = (
        encode_pairs(layer.key_layout, layer.value_layout, k * f, v * f)
        for f in (1.0, 1.0 - NEAR, 1.0 + NEAR)
    )
    return any(not np.array_equal(side[name], middle[name]) for side in sides for name in middle)
