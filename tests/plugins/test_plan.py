"""The plugin launches what the Triton backend would: grids, splits, spans and arguments."""

import itertools
import json
import math
import struct
import subprocess
from dataclasses import replace

import pytest
import torch

import less_cache as lc
from less_cache import ops
from less_cache.policies import Gain
from tests.plugins.built import built

pytest.importorskip("triton")

from less_cache.backends.triton import launch as launching
from less_cache.backends.triton.aot.on_meta import meta_maps, meta_step
from less_cache.backends.triton.aot.variants import Variant
from less_cache.backends.triton.decode import KINDS
from less_cache.backends.triton.launch import Launch, recording

HIDDEN = 48
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
    for name in launch.kernel.arg_names:
        value = launch.arguments.get(name)
        if "scales" in name:
            # Of coded pairs, which the plugin refuses.
            continue
        if isinstance(value, torch.Tensor):
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
    constants = launch.constants
    name = launch.kernel.__name__
    selects = name == "select_and_map"
    fields = (
        name,
        variant.dtype,
        "",
        90,
        0,
        variant.head_dim,
        constants["BLOCK_D"],
        1 << score_bit(variant.policy),
        -1,
        0,
        0 if selects else constants["BLOCK_G"],
        -1,
        constants.get("BLOCK_B", 0),
        -1.0,
        int(splits > 1) if name == "attend" else -1,
        1,
        1,
        constants["BLOCK_C"] if name == "attend" else 0,
        launch.warps,
        0,
        name,
        parameters(launch),
    )
    return "\t".join(map(str, ("record", *fields)))


def layer_line(variant: Variant, multiprocessors: int) -> str:
    layer = variant.config.layer(0)
    policy = layer.policy
    fields = (
        layer.query_heads,
        layer.kv_heads,
        layer.head_dim,
        HIDDEN if layer.rank else 0,
        layer.dtype,
        "float32",
        int(policy.starts),
        int(policy.gains),
        policy.sinks,
        policy.protected_recent,
        policy.decay,
        policy.history_window,
        layer.capacity,
        layer.rank,
        KINDS[variant.kind] if layer.rank else 0,
        layer.scale,
        layer.softcap or 0.0,
        variant.batch,
        90,
        multiprocessors,
        0,
    )
    return "\t".join(map(str, ("layer", *fields)))


def planned(lines: list[str]) -> list[tuple[list[list[str]], str]]:
    """Each layer's launches, as lists of fields, and the last line's value."""
    result = subprocess.run(
        [built("plan_dump")], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    answers, found = [], []
    for line in result.stdout.splitlines():
        fields = line.split("\t")
        if fields[0] in ("end", "refused"):
            answers.append((found, line))
            found = []
        else:
            found.append(fields)
    return answers


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
        elif name.startswith(("phi_w", "psi_w", "psi_s", "psi_b")):
            place = len(names) + len(state) + ops.map_names(variant.kind).index(name)
            assert (source, int(index)) == ("input", place), name
        elif layer.rank or name not in ("phi_out", "psi_out", "H", "z"):
            assert source == "workspace", name
        else:
            assert source == "null", name


@pytest.mark.parametrize("multiprocessors", [1, 58, 132])
def test_the_plugin_launches_what_the_backend_does(monkeypatch, multiprocessors):
    monkeypatch.setattr(launching, "processors", lambda device: multiprocessors)
    answers = []
    for variant in VARIANTS:
        wanted = launches(variant)
        table = {}
        for splits in (1, 2):
            for launch in launches(variant, splits):
                # A capacity of few tiles cannot be shared at all.
                shared = launch.grid[-1] if launch.kernel.__name__ == "attend" else splits
                table[launch.kernel.__name__, shared > 1] = record(variant, launch, shared)
        [(found, last)] = planned([*table.values(), layer_line(variant, multiprocessors)])
        assert last.startswith("end"), (variant, last)
        assert len(found) == len(wanted), variant
        for launch, (name, x, y, warps, arguments) in zip(wanted, found, strict=True):
            assert name == launch.kernel.__name__
            grid = (*launch.grid, 1)[:2]
            assert (int(x), int(y), int(warps)) == (*grid, launch.warps), (variant, name)
            check_arguments(variant, launch, arguments)
        answers.append(len(found))
    assert {2, 3} == set(answers) or multiprocessors == 1


def test_the_workspace_holds_the_scratch_arrays(monkeypatch):
    monkeypatch.setattr(launching, "processors", lambda device: 132)
    variant = replace(VARIANTS[0], capacity=8192, batch=2, kv_heads=8, group=4)
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


FIELDS = (
    *("kernel", "dtype", "state_dtype", "arch", "ptx", "head_dim", "block_d", "scores", "kind"),
    *("group", "block_g", "block_r", "block_b", "softcap", "split", "hidden_multiple"),
    *("rank_multiple", "block_c", "warps", "shared_bytes", "symbol", "parameters"),
)
POLICIES = (lc.FullCache(), lc.SinkWindow(), lc.KeyNorm(), lc.H2O(), lc.Scissorhands())
BY_BIT = {score_bit(policy): policy for policy in POLICIES}


def test_every_kernel_that_was_compiled_can_be_launched():
    table = json.loads(built("kernels.json").read_text())["kernels"]
    lines = [
        "\t".join(map(str, ("record", *(int(v) if isinstance(v, bool) else v for v in row))))
        for row in ([kernel[field] for field in FIELDS] for kernel in table)
    ]
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
            )
            for score in BY_BIT
            if kernel["scores"] >> score & 1
            for batch in (1, 200)
        ]
    arches = {kernel["arch"] for kernel in table if not kernel["ptx"]}
    for arch in arches:
        wanted = [
            layer_line(v, 132).rsplit("\t", 3)[0] + f"\t{arch}\t132\t232448" for v in variants
        ]
        for variant, (found, last) in zip(variants, planned([*lines, *wanted]), strict=True):
            assert last.startswith("end"), (variant, last)
            assert len(found) == (3 if variant.batch == 1 else 2)
