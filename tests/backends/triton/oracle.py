"""One layer on the Triton backend beside the float64 reference, compared after each call."""

from __future__ import annotations

import numpy as np
import torch

import less_cache as lc
from less_cache.arrays import LayerArrays, empty_arrays
from less_cache.backends import reference
from less_cache.backends import triton as backend
from less_cache.layer_config import LayerConfig
from tests.helpers import assert_close, random_maps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(**changes) -> lc.CacheConfig:
    """Two KV heads of 16, seven slots, rank 4, but for `changes`; `group` for query heads."""
    parameters = {
        "num_layers": 1,
        "kv_heads": 2,
        "head_dim": 16,
        "capacity": 7,
        "policy": lc.H2O(),
        "rank": 4,
        **changes,
    }
    group = parameters.pop("group", 1)
    return lc.CacheConfig(query_heads=group * parameters["kv_heads"], **parameters)


class Pair:
    """A layer's arrays on both backends, fed with the same numbers.

    The reference has a row for each sequence; the backend's arrays may be a pool of more, in which
    sequence i has row ``rows[i]``.
    """

    def __init__(
        self,
        config: lc.CacheConfig,
        batch: int,
        kind: str = "exp",
        seed: int = 0,
        *,
        arrays: LayerArrays | None = None,
        rows: torch.Tensor | None = None,
        length_dtype: torch.dtype = torch.int32,
    ):
        self.layer: LayerConfig = config.layer(0)
        self.wide = config.replace(dtype="float64", state_dtype=None).layer(0)
        self.batch = batch
        self.arrays = empty_arrays(self.layer, batch, device=DEVICE) if arrays is None else arrays
        self.rows = rows
        self.expected = empty_arrays(self.wide, batch)
        self.lengths = torch.zeros(batch, dtype=length_dtype, device=DEVICE)
        self.generator = torch.Generator().manual_seed(seed)
        maps = random_maps(config, kind, seed, hidden=24)
        self.maps = self.wide_maps = None
        if maps is not None:
            self.maps = backend.prepare_maps(maps[0], self.layer, DEVICE)
            self.wide_maps = reference.prepare_maps(maps[0], self.wide, "cpu")

    def inputs(self, tokens: int):
        """q, k, v in the layer's dtype, strided as a model's projections are."""
        heads = (self.layer.query_heads, self.layer.kv_heads, self.layer.kv_heads)
        return [
            torch.randn(self.batch, tokens, count, self.layer.head_dim, generator=self.generator)
            .to(getattr(torch, self.layer.dtype))
            .to(DEVICE)
            .transpose(1, 2)
            for count in heads
        ]

    def mask(self, tokens: int):
        return (torch.rand(self.batch, tokens, generator=self.generator) < 0.7).to(DEVICE)

    def check(self, inputs, mask=None, bound: float = 5e-5, call=backend.attend) -> None:
        """Make the call on both, and compare outputs and arrays."""
        before = self.lengths.clone()
        out = call(
            self.layer,
            self.arrays,
            self.maps,
            *inputs,
            lengths=self.lengths,
            rows=self.rows,
            mask=mask,
        )
        assert torch.equal(self.lengths, before), "lengths are the caller's"
        expected = reference.attend(
            self.wide,
            self.expected,
            self.wide_maps,
            *(array.cpu().double() for array in inputs),
            lengths=self.lengths.cpu(),
            mask=None if mask is None else mask.cpu(),
        )
        self.lengths += inputs[0].shape[2] if mask is None else mask.sum(1)
        assert_close(out.double().cpu().numpy(), expected.numpy(), bound, "out")
        self.compare(bound)

    def compare(self, bound: float) -> None:
        """Each head's pairs in order of position, and H and z; of empty slots the position alone.

        What a row of length 0 holds is compared, too: nobody looks at it.
        """
        begun = (self.lengths > 0).cpu()
        index = slice(None) if self.rows is None else self.rows.long().cpu()
        arrays = {n: a.cpu()[index][begun].double() for n, a in self.arrays.named().items()}
        expected = {n: a[begun].double() for n, a in self.expected.named().items()}
        for name in ("H", "z"):
            assert_close(arrays[name].numpy(), expected[name].numpy(), bound, name)
        for head in range(self.layer.kv_heads):
            slots = self.layer.head_slots(head)
            found, wanted = (sorted_head(side, slots) for side in (arrays, expected))
            for name in wanted:
                actual, right = found[name].numpy(), wanted[name].numpy()
                if name == "scores":
                    assert_close(actual, right, bound, name)
                else:
                    np.testing.assert_array_equal(actual, right, name)


def sorted_head(arrays: dict[str, torch.Tensor], slots: slice) -> dict[str, torch.Tensor]:
    positions = arrays["positions"][:, slots]
    order = positions.argsort(dim=1, stable=True)
    sides = {"positions": positions.gather(1, order)}
    empty = sides["positions"] < 0
    for name in ("scores", "history"):
        if name in arrays:
            # Of empty slots they are zero, not anything.
            sides[name] = arrays[name][:, slots].gather(1, order)
    for name in ("keys", "values"):
        taken = arrays[name][:, slots]
        taken = taken.gather(1, order.unsqueeze(2).expand(-1, -1, taken.shape[2]))
        sides[name] = taken.masked_fill(empty.unsqueeze(2), 0)
    return sides
