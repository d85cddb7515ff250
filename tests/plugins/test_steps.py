"""The plugin's plan carried out by Triton's interpreter is the float64 reference's step.

The kernels are those that are compiled ahead of time, with the same constants and parameters; the
plugin says which to launch, in what grid, and where in which tensor or the workspace each
argument lies.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.jit import JITFunction

import less_cache as lc
from less_cache import ops
from less_cache.backends.triton.aot.layouts import Layout
from less_cache.backends.triton.aot.records import generalised, launches, record_of
from less_cache.backends.triton.launch import INTERPRETED, block
from tests.helpers import assert_close, random_inputs, random_maps
from tests.plugins.lines import layer_fields, line, planned, record_line
from tests.plugins.steps import Case, Step, by_position, taken
from tests.quantization.fitted import fitted

TORCH_TYPES = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i32": torch.int32,
    "*i64": torch.int64,
    "*u8": torch.uint8,
}
HIDDEN = 16
SCRATCH = 0xFF
"""What the workspace is full of: NaN, and numbers that lead astray."""

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compares under Triton's interpreter")


class Kernels:
    """The kernels of one kind of cache, as the plugin's table has them."""

    def __init__(self, layout: Layout) -> None:
        self.lines, self.found = [], {}
        for number, wanted in enumerate(launches(layout)):
            compilable = replace(
                wanted, kernel=JITFunction(wanted.kernel.fn, **wanted.kernel.kwargs)
            )
            parameters = generalised(compilable, layout)
            told = SimpleNamespace(name=f"{wanted.kernel.__name__}.{number}", shared=0)
            record = record_of(compilable, parameters, layout, 90, False, told)
            self.lines.append(record_line(record.to_dict()))
            self.found[record.symbol] = (wanted, parameters)

    def launch(self, symbol: str, grid: tuple[int, int], arguments: dict) -> None:
        wanted, parameters = self.found[symbol]
        given = {}
        for name, value in arguments.items():
            kind = parameters.types[name]
            if isinstance(value, torch.Tensor):
                value = value.view(-1).view(TORCH_TYPES[kind])
            given[name] = value
        assert list(given) == list(parameters.parameters)
        wanted.kernel[grid](**given, **parameters.constants)


def layout_of(step: Step) -> Layout:
    layer = step.layer
    group = 1 if layer.group == 1 else block(layer.group)
    rank = block(layer.rank) if layer.rank else 0
    return Layout(
        dtype=layer.dtype,
        head_dim=layer.head_dim,
        score=(layer.policy.starts, layer.policy.gains),
        kind=step.kind,
        group=group,
        rank=rank,
        rank_multiple=layer.rank & -layer.rank if rank else 1,
        softcap=layer.softcap,
        codes=layer.quantization,
    )


def carried_out(step: Step, multiprocessors: int) -> tuple[torch.Tensor, dict, int]:
    """The output, the state's arrays, and how many programs a launch had along y at most."""
    kernels = Kernels(layout_of(step))
    fields = layer_fields(step.layer, step.kind, HIDDEN)
    asked = line("layer", *fields, step.batch, 90, multiprocessors, 10**6)
    [(planned_launches, last)] = planned([*kernels.lines, asked])
    assert last.startswith("end"), last
    inputs = {name: tensor.clone() for name, tensor in step.inputs.items()}
    workspace = torch.full((int(last.split("\t")[1]),), SCRATCH, dtype=torch.uint8)
    out = torch.full_like(inputs["q"], torch.nan)
    state = {name: inputs[name] for name in ops.state_names(step.layer)}
    places = {
        "input": list(inputs.values()),
        # The state's outputs are aliased with its inputs.
        "output": [out, *state.values()],
    }
    for _, symbol, x, y, _, text in planned_launches:
        arguments = {}
        for item in text.split():
            name, value = item.split("=")
            source, index, bits = value.split(":")
            if source in places:
                arguments[name] = places[source][int(index)]
            elif source == "workspace":
                # Whatever lies behind it is another array's.
                arguments[name] = workspace[int(bits) : len(workspace) // 16 * 16]
            elif source == "number":
                real = name in ("SCALE", "DECAY")
                number = struct.unpack("<f", struct.pack("<I", int(bits)))[0]
                arguments[name] = number if real else int(bits)
            else:
                raise AssertionError(f"{name}: {source}")
        kernels.launch(symbol, (int(x), int(y)), arguments)
    return out, state, max(int(y) for _, _, _, y, *_ in planned_launches[1:])


def compare(step: Step, multiprocessors: int = 1) -> int:
    out, state, splits = carried_out(step, multiprocessors)
    out_bound, state_bound = step.bounds
    assert_close(out.double().numpy(), step.out, out_bound, "out")
    flat = {n: x.double() if x.dtype == torch.bfloat16 else x for n, x in state.items()}
    arrays = {
        name: x.view(torch.uint8).numpy() if x.dtype == torch.int8 else x.numpy()
        for name, x in flat.items()
    }
    found = by_position(step.layer, arrays)
    held = step.after["positions"] >= 0
    np.testing.assert_array_equal(found["positions"], step.after["positions"])
    for name, wanted in step.after.items():
        own_array = found[name]
        if name not in ("H", "z"):
            own_array, wanted = own_array[held], wanted[held]
        if name in ("scores", "H", "z"):
            assert_close(own_array, wanted, state_bound, name)
        else:
            np.testing.assert_array_equal(own_array, wanted, name)
    return splits


def step_of(config: lc.CacheConfig, kind: str, *, batch: int, prompt: int) -> Step:
    codes = config.quantization
    calibrated = codes is not None and codes.transform == "calibrated"
    transforms = fitted(config) if calibrated else None
    maps = random_maps(config, kind, hidden=HIDDEN)
    for seed in itertools.count():
        case = Case("", config, kind, batch, prompt, seed)
        rng = np.random.default_rng(seed)
        tokens = [*random_inputs(config, batch, prompt + 1, rng)]
        if (step := taken(case, maps, tokens, transforms)) is not None:
            return step
    raise AssertionError


def config_of(codes: lc.Quantization | None, **changes) -> lc.CacheConfig:
    parameters = {
        "num_layers": 1,
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "capacity": 20,
        "policy": lc.H2O(recent=3),
        "rank": 4,
        "dtype": "float32",
        "quantization": codes,
    }
    return lc.CacheConfig(**{**parameters, **changes})


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_planned_step_over_codes_is_the_references(bits, kind):
    config = config_of(lc.Quantization(bits, bits, kind))
    compare(step_of(config, "exp", batch=3, prompt=40))


@pytest.mark.parametrize(
    ("changes", "maps"),
    [
        ({"codes": None}, "paper"),
        ({"codes": None, "dtype": "float16", "policy": lc.Scissorhands(window=9)}, "exp"),
        ({"codes": (4, 2, "calibrated"), "rank": 0, "policy": lc.TOVA()}, "exp"),
        ({"codes": (3, 8, "hadamard"), "policy": lc.Scissorhands(window=9)}, "paper"),
        ({"codes": (3, 3, "calibrated"), "dtype": "float16", "query_heads": 2}, "paper"),
        ({"codes": (8, 2, "calibrated"), "dtype": "bfloat16", "head_dim": 80}, "exp"),
        ({"codes": (2, 2, "hadamard"), "policy": lc.KeyNorm(recent=2), "softcap": 5.0}, "exp"),
        ({"codes": ((6, 4, 4, 3, 3, 2, 2, 0), 3, "calibrated"), "policy": lc.SinkWindow(1)}, "exp"),
    ],
)
def test_other_layers(changes, maps):
    codes = changes.pop("codes")
    config = config_of(None if codes is None else lc.Quantization(*codes), **changes)
    compare(step_of(config, maps, batch=2, prompt=33))


@pytest.mark.parametrize("codes", [None, lc.Quantization(3, 3, "calibrated")])
def test_slots_that_programs_share(codes):
    # Kernel B reads as many slots at a time as 8 KB of keys, or of unpacked codes, are.
    config = config_of(codes, capacity=600, kv_heads=1, query_heads=2)
    step = step_of(config, "exp", batch=1, prompt=605)
    assert compare(step, multiprocessors=8) > 1
