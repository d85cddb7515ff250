"""What a decode step of one layer launches, all but the tensors: made once, called each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ...arrays import PAGE_ALIGNMENT, array_shapes
from ...layer_config import LayerConfig
from ...layer_maps import LayerMaps
from ...policies import Gain
from .kernels.attend import attend, conclude_split
from .kernels.maths import EXP, NO_MAPS, PAPER
from .kernels.planes import codes_text
from .kernels.select_maps import select_and_map
from .launch import ALL_REGISTERS, block, current, dot_type
from .ready import ReadyLaunch
from .tiles import Tiles

KINDS = {"paper": PAPER.value, "exp": EXP.value}

WEIGHTS = (
    "phi_w1",
    "phi_w2",
    "psi_w1",
    "psi_b1",
    "psi_w2",
    "psi_w3",
    "psi_s1",
    "psi_s2",
    "psi_b",
)
"""Tensors of the maps that kernel A reads, where there are such."""

STAGES = 3
"""Turns of a loop, of which two have their loads under way while one is computed."""

SLOTS_A_TILE = {1: 512, 16: 128, 32: 32}
"""Slots that kernel A looks at at a time, by the sequences of a program: none too many to spill."""

MOST_SCANNED = 512
"""Slots of a head up to which the programs that map its victims look for them, too.

They have many sequences each, and few slots at a time. One more launch costs less than more slots.
"""

SCORES_A_THREAD = 2
"""Slots whose scores a thread of kernel B updates at a time, at most ranks."""

SCORES_AT_RANK_16 = 4
"""The same at ranks from 9 to 16: by the compiler's report 2 would spill a few bytes on sm_80."""

SCORES_AT_THE_END = 8
"""The same of `conclude_split`, which has registers to spare and many slots to go through."""

ALIGNED_ARRAYS = ("keys", "values", "H")
"""Arrays that are read a vector at a time."""

SELECTS_FROM = ("keys", "key_scales", "scores", "positions")
"""Arrays that kernel A reads."""

FROM_ARRAYS = (
    "keys",
    "values",
    "key_scales",
    "value_scales",
    "scores",
    "positions",
    "history",
    "H",
    "z",
)
"""Arrays that kernel B reads, and changes."""


class StepLaunches:
    """The launches of decode steps that differ in nothing but what their tensors hold.

    Parameters
    ----------
    layer, maps, q, k, v, mask
        As `step` has them: of the tensors, shapes, strides and dtypes are looked at.
    array_strides
        Of each of the cache's arrays, the numbers from a row to the next; ``None``: there is none.
    tile
        From `tiles`.

    Attributes
    ----------
    scratch : dict
        By name, shape and dtype of what a step needs besides: `run` is given them.
    """

    def __init__(
        self,
        layer: LayerConfig,
        maps: LayerMaps | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        array_strides: Mapping[str, int | None],
        tile: Tiles,
    ) -> None:
        self.layer = layer
        batch, heads = q.shape[0], layer.kv_heads
        split = tile.splits > 1
        coded = layer.key_layout is not None
        wide = torch.float32
        self.scratch: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "slots": ((batch, heads), torch.int32),
            "phi_out": ((batch, layer.query_heads, layer.rank), wide),
            "psi_out": ((batch, heads, layer.rank), wide),
            "out": (tuple(q.shape), q.dtype),
        }
        if layer.policy.gains is not Gain.NONE:
            self.scratch["logits"] = ((batch, layer.slots * layer.group), wide)
        parts = (batch, heads, tile.splits, tile.group)
        if split:
            self.scratch["part_peak"] = self.scratch["part_mass"] = (parts, wide)
        if split or coded:
            self.scratch["part_numerator"] = ((*parts, tile.head_dim), wide)
        strides, aligned = row_strides(layer, array_strides)
        strides |= {"q_row_stride": q.stride(0), "q_head_stride": q.stride(1)}
        self.launches = _select_and_map(layer, maps, q, strides, aligned)
        numbers = {
            "capacity": layer.capacities[0],
            "splits": tile.splits,
            "k_row_stride": k.stride(0),
            "k_head_stride": k.stride(1),
            "v_row_stride": v.stride(0),
            "v_head_stride": v.stride(1),
            "mask_stride": 0 if mask is None else mask.stride(0),
            **strides,
            "logits_row_stride": layer.slots * layer.group,
        }
        scores = SCORES_AT_RANK_16 if 8 < layer.rank <= 16 else SCORES_A_THREAD
        shared = {
            **codes_constants(layer),
            "HAS_MASK": mask is not None,
            **policy_constants(layer),
            "GROUP": layer.group,
            "SINGLE": layer.group == 1,
            "KV_HEADS": layer.kv_heads,
            "HEAD_DIM": layer.head_dim,
            "RANK": layer.rank,
            "ALIGNED": aligned,
            "BLOCK_G": tile.group,
            "BLOCK_D": tile.head_dim,
            "BLOCK_R": tile.rank,
            "BLOCK_S": scores * 32 * tile.warps,
        }
        constants = {
            **shared,
            "SPLIT": split,
            "BLOCK_C": tile.slots,
            "AHEAD": tile.ahead,
            "DOT": products_type(layer),
        }
        programs = batch * layer.kv_heads
        tensors = (
            *("q", "k", "v", "mask", "rows", "lengths", "heads", *FROM_ARRAYS),
            *("slots", "phi", "psi", "shift", "logits", "out"),
            *("part_peak", "part_mass", "part_numerator"),
        )
        self.launches.append(
            ReadyLaunch(
                attend,
                (programs, tile.splits),
                tensors,
                numbers,
                constants,
                warps=tile.warps,
                stages=STAGES,
                registers=ALL_REGISTERS if coded or layer.dtype == "float32" else None,
            )
        )
        if split:
            last = {**shared, "BLOCK_S": SCORES_AT_THE_END * 32 * tile.warps}
            self.launches.append(
                ReadyLaunch(conclude_split, (programs,), tensors, numbers, last, warps=tile.warps)
            )

    def run(
        self, given: dict[str, Tensor | None], *, aligned: bool, device: torch.device
    ) -> Tensor:
        """Launch them, and give back what `attend` returns.

        Parameters
        ----------
        given
            q, k, v, `WEIGHTS`, the cache's arrays, `scratch`, and rows, lengths, mask, shift and
            heads; all by name. More are put to them.
        aligned, device
            As `ReadyLaunch` has them.
        """
        given["slot_out"] = given["slots"]
        given["phi"] = given["phi_out"] if self.layer.rank else None
        given["psi"] = given["psi_out"] if self.layer.rank else None
        for name in ("logits", "part_peak", "part_mass", "part_numerator"):
            given.setdefault(name)
        with current(device):
            for launch in self.launches:
                launch(given, aligned=aligned, device=device)
        out = given["out"]
        if out is None:
            raise AssertionError("a step always has an output")
        return out


def row_strides(
    layer: LayerConfig, array_strides: Mapping[str, int | None]
) -> tuple[dict[str, int], bool]:
    """The kernels' strides between rows, and whether `ALIGNED_ARRAYS` begin each at 16 bytes.

    Where they do, their strides are counted in 16 bytes.
    """
    strides = {name: array_strides[name] or 0 for name in FROM_ARRAYS}
    shapes = array_shapes(layer)
    sizes = {name: getattr(torch, shapes[name][1]).itemsize for name in ALIGNED_ARRAYS}
    widths = {name: PAGE_ALIGNMENT // size for name, size in sizes.items()}
    aligned = all(strides[name] % width == 0 for name, width in widths.items())
    if aligned:
        strides |= {name: strides[name] // width for name, width in widths.items()}
    return {f"{name}_row_stride": stride for name, stride in strides.items()}, aligned


def products_type(layer: LayerConfig) -> Any:
    """The type of kernel B's products: codes are exact in float16, and queries better off there."""
    dtype = getattr(torch, layer.dtype)
    if layer.key_layout is not None and dtype.itemsize == 2:
        dtype = torch.float16
    return dot_type(dtype)


def codes_constants(layer: LayerConfig) -> dict[str, str]:
    """How pairs are coded, as compile-time constants."""
    return {
        "KEY_CODES": codes_text(layer.key_layout),
        "VALUE_CODES": codes_text(layer.value_layout),
    }


def policy_constants(layer: LayerConfig) -> dict[str, Any]:
    """The policy and the logits' scale as compile-time constants."""
    return {
        "START": int(layer.policy.starts),
        "GAIN": int(layer.policy.gains),
        "DECAY": float(layer.policy.decay),
        "WINDOW": layer.policy.history_window,
        "SCALE": layer.scale,
        "SOFTCAP": layer.softcap or 0.0,
    }


def _select_and_map(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    strides: Mapping[str, int],
    aligned: bool,
) -> list[ReadyLaunch]:
    """Kernel A, once or twice."""
    if maps is None or max(layer.capacities) <= MOST_SCANNED:
        return [_first_kernel(layer, maps, q, strides, aligned, selects=True)]
    return [
        _first_kernel(layer, None, q, strides, aligned, selects=True),
        _first_kernel(layer, maps, q, strides, aligned, selects=False),
    ]


def _first_kernel(
    layer: LayerConfig,
    maps: LayerMaps | None,
    q: Tensor,
    strides: Mapping[str, int],
    aligned: bool,
    *,
    selects: bool,
) -> ReadyLaunch:
    """Kernel A that chooses victims, applies maps, or both."""
    batch = q.shape[0]
    own = ("q_row_stride", "q_head_stride", *(f"{name}_row_stride" for name in SELECTS_FROM))
    numbers = {
        "batch": batch,
        "capacity": layer.capacities[0],
        "sinks": layer.policy.sinks,
        "recent": layer.policy.protected_recent,
        **{name: strides[name] for name in own},
    }
    rank = 0 if maps is None else layer.rank
    sequences = 1 if maps is None else 16 if batch <= 16 else 32
    dtype = q.dtype if maps is None else maps.tensors["phi_w1"].dtype
    # A row of the first product is a hidden number: with as many as eight warps have, none repeats
    # another's; wider heads would take too much shared memory, higher ranks too many registers.
    wide = layer.head_dim > 128 or rank > 32
    most_hidden = 32 if dtype.itemsize == 4 else 64 if wide else 128
    constants = {
        "SELECTS": selects,
        # Whoever finds the victims chosen is one kernel for all policies.
        "START": int(layer.policy.starts) if selects else 0,
        "GAIN": int(layer.policy.gains) if selects else 0,
        "KIND": NO_MAPS.value if maps is None else KINDS[maps.kind],
        "QUERY_HEADS": layer.query_heads,
        "KV_HEADS": layer.kv_heads,
        "KEY_CODES": codes_text(layer.key_layout),
        "HEAD_DIM": layer.head_dim,
        "HIDDEN": 0 if maps is None else maps.hidden,
        "RANK": rank,
        "ALIGNED": aligned,
        "BLOCK_B": sequences,
        "BLOCK_C": SLOTS_A_TILE[sequences],
        "BLOCK_D": block(layer.head_dim),
        "BLOCK_H": most_hidden if maps is None else min(most_hidden, block(maps.hidden)),
        "BLOCK_R": block(rank),
        "DOT": dot_type(dtype),
    }
    units = layer.kv_heads + (layer.query_heads if maps is not None else 0)
    return ReadyLaunch(
        select_and_map,
        (units, triton.cdiv(batch, sequences)),
        (
            *("q", "rows", "lengths", "heads", *SELECTS_FROM, *WEIGHTS),
            *("slot_out", "phi_out", "psi_out"),
        ),
        numbers,
        constants,
        warps=4 if maps is None else 8,
        stages=STAGES,
        registers=ALL_REGISTERS if layer.key_layout is not None or dtype.itemsize == 4 else None,
    )
