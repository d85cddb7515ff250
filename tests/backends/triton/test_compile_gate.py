"""Every kernel compiles for every GPU generation, and takes no more than there is."""

import json

import pytest

from tests.backends.triton.compiling import run

KERNELS = {
    "select_and_map",
    "attend",
    "conclude_split",
    "attend_chunk",
    "sum_columns",
    "scan",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the usual kernels; without ``--few`` the gate takes each type, size and policy."""
    folder = tmp_path_factory.mktemp("gate")
    path = folder / "report.json"
    gate = ["-m", "less_cache.backends.triton.aot.compile_gate", "--few", "--processes", "1"]
    result = run([*gate, "--json", str(path)], folder)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_and_spill_no_registers(capability, report):
    own = [kernel for kernel in report if kernel["capability"] == capability]
    assert {kernel["kernel"] for kernel in own} == KERNELS
    for kernel in own:
        assert 0 < kernel["registers"] <= 255
        assert 0 <= kernel["loop"] < kernel["instructions"]
        if kernel["kernel"] == "attend" and "3 bits" in kernel["variant"]:
            # A conversion of each byte by itself would take more.
            assert kernel["loop"] * kernel["warps"] / kernel["tile"] < 64
        assert kernel["spilled_bytes"] == 0, kernel
        if kernel["kernel"] in ("attend", "attend_chunk", "sum_columns"):
            assert kernel["under_way"] >= 1, kernel
            assert kernel["waited_for"] == 0, kernel


def test_the_gate_sees_a_kernel_that_spills_or_waits(tmp_path):
    # A tile four times too large for its warps: the gate must not call it well.
    script = """
import dataclasses
from less_cache.backends.triton.aot import compile_gate, variants
from less_cache.backends.triton.launch import recording
with recording() as launches:
    variants.launches_of(variants.Variant(dtype="float32"))
wanted = next(w for w in launches if w.kernel.__name__ == "attend")
constants = wanted.constants | {"BLOCK_C": 64}
spilling = dataclasses.replace(wanted, constants=constants, warps=4, registers=None)
print(compile_gate.problems(compile_gate.compile_launch(spilling, 90), 128))
waiting = dataclasses.replace(wanted, stages=2)
print(compile_gate.problems(compile_gate.compile_launch(waiting, 90), 128))
wanted = next(w for w in launches if w.kernel.__name__ == "attend_chunk")
waiting = dataclasses.replace(wanted, stages=2)
print(compile_gate.problems(compile_gate.compile_launch(waiting, 90), 128))
coded = variants.Variant(codes=variants.Quantization(3, 3), head_dim=80)
with recording() as launches:
    variants.launches_of(coded)
wanted = next(w for w in launches if w.kernel.__name__ == "attend")
left = dataclasses.replace(wanted, constants=wanted.constants | {"AHEAD": False})
for launch in (wanted, left):
    print(compile_gate.problems(compile_gate.compile_launch(launch, 90), 80))
"""
    result = run(["-c", script], tmp_path)
    spilled, waited, chunk, ahead, left, *_ = [*result.stdout.splitlines(), *5 * [""]]
    assert "registers spilled" in spilled, result.stdout + result.stderr
    assert waited == chunk == "['no load is under way while the loop computes']"
    assert ahead == "[]"
    # Positions and scales still come a turn ahead; 20 bytes of low bits and 10 of high ones do not.
    assert left == "['each turn waits for 4 loads of its own']"


def test_the_package_works_without_triton(tmp_path):
    script = """
import sys
sys.modules["triton"] = None
import torch
import less_cache as lc
from less_cache.backends import best_backend
config = lc.CacheConfig(1, 2, 2, 4, capacity=3, policy=lc.H2O(), rank=0)
manager = lc.CacheManager(config)
q = torch.ones(1, 2, 1, 4)
assert manager.attend(manager.init(1), 0, q, q, q).shape == q.shape
assert best_backend(config, "cuda") == "torch"
try:
    lc.CacheManager(config, backend="triton")
except ImportError as error:
    print(error)
"""
    result = run(["-c", script], tmp_path)
    assert "less_cache[triton]" in result.stdout, result.stdout + result.stderr
