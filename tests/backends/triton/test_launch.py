"""How kernels are launched: on the tensors' device, and compiled once for all steps and batches."""

import contextlib

import torch

from less_cache import policies
from less_cache.backends.triton import launch
from less_cache.backends.triton.kernels import maths
from less_cache.backends.triton.ready import ReadyLaunch, all_aligned
from tests.backends.triton.compiling import run


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch):
    current, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], str(wanted)
        yield
        current[0] = before

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append((current[0], grid, arguments))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(current[0][-1]))
    kernel = Kernel()
    launch.launch(kernel, (3,), {"a": 1}, {"B": 2}, device=torch.device("cuda:1"), warps=8)
    launch.launch(kernel, (3,), {"a": 1}, {"B": 2}, device=torch.device("cpu"))
    arguments = {"a": 1, "B": 2, "num_stages": 2}
    assert seen == [
        ("cuda:1", (3,), {**arguments, "num_warps": 8}),
        ("cuda:0", (3,), {**arguments, "num_warps": 4}),
    ]
    assert current == ["cuda:0"]


def test_a_kernel_is_found_once_and_called_then_where_all_is_as_aligned(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    found, called = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: called.append((grid, arguments))

    class Kernel:
        arg_names = ("x", "count", "y", "BLOCK")

        def __getitem__(self, grid):
            return lambda **arguments: found.append(arguments) or Compiled()

    one = ReadyLaunch(Kernel(), (3,), ["y", "x"], {"count": 5}, {"BLOCK": 2}, warps=8)
    cpu = torch.device("cpu")
    for turn in range(3):
        one({"x": turn, "y": None, "more": 0}, aligned=True, device=cpu)
    assert [x["x"] for x in found] == [0]
    assert called == [((3, 1, 1), (turn, 5, None, 2)) for turn in (1, 2)]
    one({"x": 3, "y": None}, aligned=False, device=cpu)
    with launch.recording() as launches:
        one({"x": 4, "y": None}, aligned=True, device=cpu)
    assert [x["x"] for x in found] == [0, 3]
    assert len(called) == 2
    assert launches[0].arguments == {"x": 4, "y": None, "count": 5}
    buffer = torch.zeros(16)
    assert all_aligned([None, buffer, buffer[4:]])
    assert not all_aligned([buffer, buffer[1:], None])


def test_kernels_number_scores_as_policies_do():
    starts = {
        name: getattr(maths, f"START_{name}").value for name in ("ZERO", "POSITION", "KEY_NORM")
    }
    gains = {name: getattr(maths, f"GAIN_{name}").value for name in ("NONE", "SUM", "HISTORY")}
    given = {**policies.Start.__members__, **policies.Gain.__members__}
    assert starts == {name: policies.Start[name] for name in starts}
    assert gains == {name: policies.Gain[name] for name in gains}
    assert {*starts, *gains, "GIVEN"} == {*given}
    assert maths.FAIR_SHARE.value == policies.FAIR_SHARE


SPECIALISATION = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
import less_cache as lc
from less_cache.arrays import empty_arrays
from less_cache.backends import triton as backend
from less_cache.backends.triton.aot.on_meta import meta_maps
from less_cache.backends.triton.launch import recording
from less_cache.layer_maps import LayerMaps

TARGET = make_backend(GPUTarget("cuda", 90, 32))
HEADS, ROWS = 4, 100


def keys(wanted):
    # What Triton looks for among the kernels that it has compiled.
    bind = create_function_from_signature(wanted.kernel.signature, wanted.kernel.params, TARGET)
    bound, specialised, _ = bind(**wanted.arguments, **wanted.constants)
    return wanted.kernel.__name__, str(specialised), wanted.warps


def cache(capacity, rank=8):
    config = lc.CacheConfig(
        1, 8, HEADS, 64, capacity=capacity, policy=lc.H2O(recent=2), rank=rank, dtype="float16"
    )
    layer = config.layer(0)
    maps = meta_maps(layer, "exp", 32)
    tensors = {name: torch.zeros_like(t, device="cpu") for name, t in maps.tensors.items()}
    return config, empty_arrays(layer, ROWS), LayerMaps("exp", tensors)


def step(config, arrays, maps, batch, tokens, rows=None):
    q, k = (torch.zeros(batch, 1, heads, 64, dtype=torch.float16) for heads in (8, HEADS))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    attended = torch.ones(batch, tokens, dtype=torch.bool)
    lengths = torch.zeros(batch + tokens, dtype=torch.int32)[tokens:]
    given = {"lengths": lengths, "mask": attended[:, -1:], "rows": rows}
    with recording() as launches:
        backend.attend(config.layer(0), arrays, maps, q, k, k, **given)
    return [keys(wanted) for wanted in launches]


alike = cache(205)
steps = {tuple(step(*alike, 3, 1000 + tokens)) for tokens in range(64)}
print("steps", len(steps))
large = cache(4096)
batches = {key for batch in range(1, 90) for key in step(*large, batch, 7)}
print("batches", sorted(name for name, *_ in batches))
others = [cache(capacity) for capacity in (31, 64, 4096, 5000)]
print("capacities", {key for one in others for key in step(*one, 17, 7)} <= {
    key for one in (cache(205), cache(4096)) for batch in (1, 17) for key in step(*one, batch, 7)})
by_head = [cache([[3, 9, 40, 64]]), cache([[300, 16, 16, 5]])]
print("by head", len({tuple(step(*one, 64, 7)) for one in by_head}))
config, _, maps = alike
page = config.page(0)
def paged(extra):
    buffer = torch.zeros(ROWS, page.nbytes + extra, dtype=torch.int8)
    return page.arrays(buffer)
everywhere = [alike[1], *(paged(extra) for extra in (0, 16, 48, 1024))]
print("pages", len({tuple(step(config, arrays, maps, 64, 7)) for arrays in everywhere}))
rows = torch.zeros(70, dtype=torch.int32)
print("rows", len({
    tuple(step(config, arrays, maps, 64, 7, rows=rows[start:64 + start]))
    for arrays in everywhere for start in range(6)
}))
def prompt(batch, tokens, before):
    q, k = (torch.zeros(batch, tokens, heads, 64, dtype=torch.float16) for heads in (8, HEADS))
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    mask = torch.ones(batch, before + tokens, dtype=torch.bool)[:, before:]
    lengths = torch.zeros(batch + before, dtype=torch.int32)[before:]
    own = empty_arrays(config.layer(0), batch)
    with recording() as launches:
        backend.attend(config.layer(0), own, maps, q, k, k, lengths=lengths, mask=mask)
        backend.eviction_times(config.layer(0), q, k, mask)
    return {keys(wanted) for wanted in launches}
found = set().union(*(prompt(1 + n % 3, 210 + n, n) for n in range(24)))
print("prompts", sorted(name for name, *_ in found))
"""


def test_nothing_is_compiled_anew_while_tokens_come_batches_change_or_pages_move(tmp_path):
    result = run(["-c", SPECIALISATION], tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [
        "steps 1",
        # Victims chosen, and two tiles of maps; heads shared out among programs, or not.
        "batches ['attend', 'attend', 'conclude_split', 'select_and_map', 'select_and_map', "
        "'select_and_map']",
        "capacities True",
        "by head 1",
        "pages 1",
        "rows 1",
        "prompts ['attend_chunk', 'scan', 'sum_columns']",
    ]
