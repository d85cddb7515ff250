"""The plugin launches what the Triton backend would: grids, splits, spans and arguments."""

import itertools
import json
import math
import struct
from dataclasses import replace

import pytest
import torch

import less_cache as lc
from less_cache import ops
from less_cache.policies import Gain
from less_cache.quantization import TRANSFORMS
from less_cache.quantization.settings import spelled_bits
from tests.plugins.built import built
from tests.plugins.lines import bits_of, layer_fields, line, planned, record_line

pytest.importorskip("triton")

from less_cache.backends.triton import launch as launching
from less_cache.backends.triton.aot.on_meta import has_means, meta_maps, meta_step
from less_cache.backends.triton.aot.records import ANY
from less_cache.backends.triton.aot.variants import Variant
from less_cache.backends.triton.launch import Launch, recording
from less_cache.backends.triton.plans import KINDS

HIDDEN = 48
CALIBRATED = lc.Quantization(4, 2, "calibrated")
NUMBERS = ("QUERY_HEADS", "KV_HEADS", "GROUP", "HIDDEN", "RANK", "WINDOW")
VARIANTS = [
    Variant(
        head_dim=head_dim,
        dtype=dtype,
        group=group,
        rank=rank,
        kind=kind,
        policy=policy,
        capacity=capacity,
        kv_heads=kv_heads,
        batch=batch,
        masked=True,
    )
    for (head_dim, dtype, policy, rank, kind), (group, kv_heads), capacity, batch in (
        itertools.product(
            (
                (64, "float16", lc.H2O(), 8, "exp"),
                (128, "bfloat16", lc.Scissorhands(window=20), 16, "paper"),
                (80, "float32", lc.SinkWindow(sinks=2), 0, "exp"),
                (256, "float16", lc.KeyNorm(recent=1), 64, "exp"),
            ),
            ((1, 1), (1, 32), (4, 8), (7, 2)),
            (17, 205, 1024, 8192),
            (1, 3, 16, 17, 300),
        )
    )
]
CODED = [
    Variant(
        head_dim=head_dim,
        dtype=dtype,
        group=group,
        rank=rank,
        policy=policy,
        capacity=capacity,
        kv_heads=kv_heads,
        batch=batch,
        masked=True,
        codes=codes,
    )
    for (head_dim, dtype, policy, rank, codes), (group, kv_heads), capacity, batch in (
        itertools.product(
            (
                (64, "float16", lc.H2O(), 8, lc.Quantization(3, 3)),
                (128, "bfloat16", lc.Scissorhands(window=20), 16, CALIBRATED),
                (80, "float32", lc.SinkWindow(sinks=2), 0, lc.Quantization(8, 8)),
                (256, "float16", lc.TOVA(), 0, lc.Quantization(2, 2, "calibrated")),
            ),
            ((1, 32), (7, 2)),
            (205, 8192),
            (1, 17),
        )
    )
]


def launches(variant: Variant, splits: int | None = None) -> list[Launch]:
    """What the backend launches for one step."""
    layer = variant.config.layer(0)
    maps = meta_maps(layer, variant.kind if variant.rank else None, HIDDEN)
    with recording() as found:
        meta_step(layer, variant.batch, maps, masked=True, splits=splits)
    return found


def parameters(launch: Launch) -> str:
    """The arguments that a kernel compiled ahead of time would take."""
    names = []
    maps = launch.constants.get("KIND", ANY) != 0
    for name in launch.kernel.arg_names:
        value = launch.arguments.get(name)
        if name in ("HIDDEN", "RANK") and not maps:
            continue
        if name.endswith("_scales_row_stride"):
            codes = launch.constants["KEY_CODES"] or launch.constants.get("VALUE_CODES")
            if codes:
                names.append(f"{name}:i64")
        elif isinstance(value, torch.Tensor):
            names.append(f"{name}:ptr")
        elif (value is not None and name != "mask_stride") or (
            name in NUMBERS and name in launch.constants
        ):
            names.append(f"{name}:i32")
        elif name in ("SCALE", "DECAY"):
            names.append(f"{name}:f32")
    return " ".join(names)


def score_bit(policy: lc.Policy) -> int:
    return 3 * int(policy.gains) + int(policy.starts)


def record(variant: Variant, launch: Launch, splits: int) -> str:
    """A line of the table: a kernel for this variant alone."""
    constants, layer = launch.constants, variant.config.layer(0)
    name = launch.kernel.__name__
    selects = name == "select_and_map"
    codes = variant.codes
    layouts = (layer.key_layout, layer.value_layout)
    key_bytes, value_bytes = (0 if layout is None else layout.nbytes for layout in layouts)
    return record_line(
        {
            "kernel": name,
            "dtype": variant.dtype,
            "state_dtype": "",
            "arch": 90,
            "ptx": False,
            "head_dim": variant.head_dim,
            "block_d": constants["BLOCK_D"],
            "scores": 1 << score_bit(variant.policy),
            "kind": constants["KIND"] if selects else ANY,
            "group": 0,
            "block_g": 0 if selects else constants["BLOCK_G"],
            "block_r": -1,
            "block_b": constants.get("BLOCK_B", 0),
            "selects": int(constants["SELECTS"]) if selects else ANY,
            "softcap": -1.0,
            "split": int(splits > 1) if name == "attend" else -1,
            "hidden_multiple": 1,
            "rank_multiple": 1,
            "block_c": constants["BLOCK_C"] if name == "attend" else 0,
            "key_bits": spelled_bits(bits_of(codes)[0]),
            "value_bits": spelled_bits(bits_of(codes)[1]),
            "transform": -1 if codes is None else TRANSFORMS.index(codes.transform),
            "key_bytes": key_bytes,
            "value_bytes": value_bytes,
            "warps": launch.warps,
            "shared_bytes": 0,
            "symbol": name,
            "parameters": parameters(launch),
        }
    )


def layer_line(variant: Variant, multiprocessors: int, arch: int = 90, shared: int = 0) -> str:
    layer = layer_fields(variant.config.layer(0), variant.kind, HIDDEN)
    return line("layer", *layer, variant.batch, arch, multiprocessors, shared)


def expected_number(launch: Launch, name: str) -> int | None:
    """What the backend gives; ``None``: it has no such array."""
    if name.endswith("_row_stride"):
        # The backend counts some of them in 16 bytes, the plugin all in numbers.
        array = launch.arguments.get(name.removesuffix("_row_stride"))
        return None if array is None or not array.numel() else array.stride(0)
    value = launch.arguments.get(name, launch.constants.get(name))
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value)


def check_arguments(variant: Variant, launch: Launch, given: str) -> None:
    names = ["q", "k", "v", "mask", "lengths"]
    layer = variant.config.layer(0)
    state = ops.state_names(layer)
    maps = ops.map_names(variant.kind if layer.rank else None)
    if layer.rank and has_means(layer):
        maps += (ops.FOLDED_BIAS, "shift")
    arguments = [item.split("=") for item in given.split()]
    assert [name for name, _ in arguments] == [
        item.split(":")[0] for item in parameters(launch).split()
    ]
    for name, value in arguments:
        source, index, bits = value.split(":")
        if source == "number":
            assert expected_number(launch, name) in (int(bits), None), name
        elif name in state:
            assert (source, int(index)) == ("output", state.index(name) + 1), name
        elif name in names:
            assert (source, int(index)) == ("input", names.index(name)), name
        elif name == "out":
            assert (source, index) == ("output", "0")
        elif name in maps:
            place = len(names) + len(state) + maps.index(name)
            assert (source, int(index)) == ("input", place), name
        elif layer.rank or name not in ("phi_out", "psi_out", "H", "z", "shift"):
            assert source == "workspace", name
        else:
            assert source == "null", name


@pytest.mark.parametrize("multiprocessors", [1, 58, 132])
def test_the_plugin_launches_what_the_backend_does(monkeypatch, multiprocessors):
    monkeypatch.setattr(launching, "processors", lambda device: multiprocessors)
    answers = []
    for variant in (*VARIANTS, *CODED):
        wanted = launches(variant)
        table = {}
        for splits in (1, 2):
            for launch in launches(variant, splits):
                # A capacity of few tiles cannot be shared at all.
                shared = launch.grid[-1] if launch.kernel.__name__ == "attend" else splits
                key = (launch.kernel.__name__, launch.constants.get("SELECTS"), shared > 1)
                table[key] = record(variant, launch, shared)
        [(found, last)] = planned([*table.values(), layer_line(variant, multiprocessors)])
        assert last.startswith("end"), (variant, last)
        assert len(found) == len(wanted), variant
        for launch, (name, _, x, y, warps, arguments) in zip(wanted, found, strict=True):
            assert name == launch.kernel.__name__
            grid = (*launch.grid, 1)[:2]
            assert (int(x), int(y), int(warps)) == (*grid, launch.warps), (variant, name)
            check_arguments(variant, launch, arguments)
        answers.append(len(found))
    assert {2, 3, 4} == set(answers) or multiprocessors == 1


@pytest.mark.parametrize("codes", [None, CALIBRATED])
def test_the_workspace_holds_the_scratch_arrays(monkeypatch, codes):
    monkeypatch.setattr(launching, "processors", lambda device: 132)
    variant = replace(VARIANTS[0], capacity=8192, batch=2, kv_heads=8, group=4, codes=codes)
    wanted = launches(variant)
    records = [record(variant, one, 2) for one in wanted]
    records += [record(variant, one, 1) for one in launches(variant, 1)]
    [(_, last)] = planned([*records, layer_line(variant, 132)])
    scratch = {
        name: value
        for one in wanted
        for name, value in one.arguments.items()
        if name in ("slots", "phi", "psi", "logits") or name.startswith("part_")
        if value is not None
    }
    needed = sum(math.prod(value.shape) * value.itemsize for value in scratch.values())
    assert needed <= int(last.split("\t")[1]) <= needed + 256 * len(scratch)
    assert variant.policy.gains is Gain.SUM


POLICIES = (lc.FullCache(), lc.SinkWindow(), lc.KeyNorm(), lc.H2O(), lc.Scissorhands())
BY_BIT = {score_bit(policy): policy for policy in POLICIES}


def codes_of(kernel: dict) -> lc.Quantization | None:
    """The codes that a kernel reads."""
    if kernel["key_bits"] == "0":
        return None
    transform = TRANSFORMS[kernel["transform"]]
    return lc.Quantization(int(kernel["key_bits"]), int(kernel["value_bits"]), transform)


def test_every_kernel_that_was_compiled_can_be_launched():
    table = json.loads(built("kernels.json").read_text())["kernels"]
    lines = [record_line(kernel) for kernel in table]
    kinds = {
        (kernel["dtype"], kernel["head_dim"]): kernel["kind"]
        for kernel in table
        if kernel["kind"] > 0
    }
    names = {number: name for name, number in KINDS.items()}
    variants = []
    for kernel in table:
        if kernel["kernel"] != "attend" or kernel["split"] or kernel["ptx"]:
            continue
        variants += [
            Variant(
                head_dim=kernel["head_dim"],
                dtype=kernel["dtype"],
                group=1 if kernel["group"] == 1 else 4,
                rank=kernel["block_r"],
                kind=names.get(kinds.get((kernel["dtype"], kernel["head_dim"])), "exp"),
                policy=BY_BIT[score],
                capacity=4096,
                kv_heads=8,
                batch=batch,
                softcap=kernel["softcap"] or None,
                codes=codes_of(kernel),
            )
            for score in BY_BIT
            if kernel["scores"] >> score & 1
            for batch in (1, 200)
        ]
    arches = {kernel["arch"] for kernel in table if not kernel["ptx"]}
    for arch in arches:
        wanted = [layer_line(variant, 132, arch, 232448) for variant in variants]
        for variant, (found, last) in zip(variants, planned([*lines, *wanted]), strict=True):
            assert last.startswith("end"), (variant, last)
            assert len(found) == 2 + (variant.rank > 0) + (variant.batch == 1)
