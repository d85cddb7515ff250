"""`CacheManager`: what it refuses, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import less_cache as lc
from tests.helpers import bits_of, random_inputs, random_maps, small_config, torch_inputs

BATCH = 3


@dataclasses.dataclass
class Bench:
    """A manager with a used state, and a good call that a test spoils in one respect."""

    manager: lc.CacheManager
    state: lc.CacheState
    call: dict[str, Any]

    @property
    def q(self) -> Any:
        return self.call["q"]

    @property
    def k(self) -> Any:
        return self.call["k"]

    @property
    def mask(self) -> Any:
        return self.call["mask"]


def bench(backend: str, tokens: int, *, numpy: bool = False, **changes: Any) -> Bench:
    config = small_config(**changes)
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state = manager.init(BATCH, dtype=np.float32 if numpy else None)
    rng = np.random.default_rng(0)

    def inputs(count: int) -> list[Any]:
        arrays = [array.astype(np.float32) for array in random_inputs(config, BATCH, count, rng)]
        return arrays if numpy else [torch.as_tensor(array) for array in arrays]

    for layer in range(config.num_layers):
        manager.attend(state, layer, *inputs(5))
        manager.attend(state, layer, *inputs(1))
    mask: Any = np.ones((BATCH, tokens), dtype=bool)
    mask = mask if numpy else torch.as_tensor(mask)
    q, k, v = inputs(tokens)
    return Bench(manager, state, {"layer": 0, "q": q, "k": k, "v": v, "mask": mask})


@dataclasses.dataclass(frozen=True)
class Bad:
    """One way to spoil a call to `attend`."""

    name: str
    argument: str
    error: type[Exception]
    change: Callable[[Bench], dict[str, Any]]


def change(argument: str, make: Callable[[Any], Any]) -> Callable[[Bench], dict[str, Any]]:
    return lambda bench: {argument: make(bench.call[argument])}


def with_values(value: float, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(mask: torch.Tensor) -> torch.Tensor:
        spoilt = mask.to(dtype)
        spoilt[0, 0] = value
        return spoilt

    return make


def other_manager_state(bench: Bench, **changes: Any) -> lc.CacheState:
    config = small_config(**changes)
    return lc.CacheManager(config, random_maps(config, seed=1)).init(BATCH)


APPEND = [
    *(
        bad
        for name in ("q", "k", "v")
        for bad in (
            Bad(f"{name}-is-none", name, TypeError, change(name, lambda x: None)),
            Bad(f"{name}-is-a-list", name, TypeError, change(name, lambda x: x.tolist())),
            Bad(f"{name}-is-numpy", name, TypeError, change(name, lambda x: x.numpy())),
            Bad(f"{name}-is-float64", name, TypeError, change(name, lambda x: x.double())),
            Bad(f"{name}-is-half", name, TypeError, change(name, lambda x: x.half())),
            Bad(f"{name}-is-integer", name, TypeError, change(name, lambda x: x.long())),
            Bad(f"{name}-is-complex", name, TypeError, change(name, lambda x: x.cfloat())),
            Bad(f"{name}-on-meta", name, ValueError, change(name, lambda x: x.to("meta"))),
            Bad(f"{name}-has-3-dims", name, ValueError, change(name, lambda x: x[0])),
            Bad(f"{name}-has-5-dims", name, ValueError, change(name, lambda x: x[None])),
            Bad(f"{name}-other-batch", name, ValueError, change(name, lambda x: x[:2])),
            Bad(f"{name}-one-row", name, ValueError, change(name, lambda x: x[:1])),
            Bad(f"{name}-too-few-heads", name, ValueError, change(name, lambda x: x[:, :1])),
            Bad(
                f"{name}-too-many-heads",
                name,
                ValueError,
                change(name, lambda x: x.repeat(1, 2, 1, 1)),
            ),
            Bad(f"{name}-short-head-dim", name, ValueError, change(name, lambda x: x[..., :3])),
            Bad(f"{name}-transposed", name, ValueError, change(name, lambda x: x.transpose(1, 2))),
        )
    ),
    Bad("q-more-tokens", "q", ValueError, change("q", lambda x: x.repeat(1, 1, 2, 1))),
    Bad("v-more-tokens", "v", ValueError, change("v", lambda x: x.repeat(1, 1, 2, 1))),
    Bad(
        "no-tokens",
        "k",
        ValueError,
        lambda bench: {
            **{name: bench.call[name][:, :, :0] for name in ("q", "k", "v")},
            "mask": None,
        },
    ),
    Bad("layer-too-high", "layer", ValueError, change("layer", lambda x: 2)),
    Bad("layer-negative", "layer", ValueError, change("layer", lambda x: -1)),
    Bad("layer-is-a-float", "layer", TypeError, change("layer", lambda x: 0.0)),
    Bad("layer-is-a-bool", "layer", TypeError, change("layer", lambda x: True)),
    Bad("layer-is-none", "layer", TypeError, change("layer", lambda x: None)),
    Bad("mask-is-a-list", "mask", TypeError, change("mask", lambda x: x.tolist())),
    Bad("mask-is-numpy", "mask", TypeError, change("mask", lambda x: x.numpy())),
    Bad("mask-of-one-row", "mask", ValueError, change("mask", lambda x: x[:1])),
    Bad("mask-of-one-dim", "mask", ValueError, change("mask", lambda x: x[0])),
    Bad("mask-too-long", "mask", ValueError, change("mask", lambda x: x.repeat(1, 2))),
    Bad("mask-4-dims", "mask", ValueError, change("mask", lambda x: x[:, None, None])),
    Bad("mask-on-meta", "mask", ValueError, change("mask", lambda x: x.to("meta"))),
    Bad("mask-is-float", "mask", TypeError, change("mask", lambda x: x.float())),
    Bad("mask-is-complex", "mask", TypeError, change("mask", lambda x: x.cfloat())),
    Bad(
        "mask-with-nan",
        "mask",
        TypeError,
        change("mask", with_values(float("nan"), torch.float32)),
    ),
    Bad("mask-with-2", "mask", ValueError, change("mask", with_values(2, torch.int64))),
    Bad("mask-with-minus-1", "mask", ValueError, change("mask", with_values(-1, torch.int32))),
    Bad("state-is-none", "state", TypeError, lambda bench: {"state": None}),
    Bad("state-is-a-layer", "state", TypeError, lambda bench: {"state": bench.state.layers[0]}),
    Bad(
        "state-of-another-capacity",
        "state",
        ValueError,
        lambda bench: {"state": other_manager_state(bench, capacity=7)},
    ),
    Bad(
        "state-of-another-policy",
        "state",
        ValueError,
        lambda bench: {"state": other_manager_state(bench, policy=lc.TOVA())},
    ),
    Bad(
        "state-of-other-maps",
        "state",
        ValueError,
        lambda bench: {"state": other_manager_state(bench)},
    ),
]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("bad", APPEND, ids=lambda bad: bad.name)
def test_bad_calls_are_refused_by_name_and_change_nothing(bad, backend, tokens):
    this = bench(backend, tokens)
    call = {"state": this.state, **this.call, **bad.change(this)}
    before = bits_of(this.state)
    bounds = [layer.tokens_bound for layer in this.state.layers]
    with pytest.raises(bad.error, match=rf"^{bad.argument}: "):
        this.manager.attend(**call)
    assert bits_of(this.state) == before
    assert [layer.tokens_bound for layer in this.state.layers] == bounds


NUMPY = [
    Bad("q-is-torch", "q", TypeError, change("q", torch.as_tensor)),
    Bad("v-is-torch", "v", TypeError, change("v", torch.as_tensor)),
    Bad("k-is-float64", "k", TypeError, change("k", lambda x: x.astype(np.float64))),
    Bad("k-is-object", "k", TypeError, change("k", lambda x: x.astype(object))),
    Bad("k-of-one-row", "k", ValueError, change("k", lambda x: x[:1])),
    Bad("mask-is-torch", "mask", TypeError, change("mask", torch.as_tensor)),
    Bad("mask-is-float", "mask", TypeError, change("mask", lambda x: x.astype(np.float32))),
    Bad("mask-is-text", "mask", TypeError, change("mask", lambda x: x.astype(str))),
    Bad("mask-with-2", "mask", ValueError, change("mask", lambda x: x.astype(np.int8) * 2)),
    Bad("mask-too-long", "mask", ValueError, change("mask", lambda x: np.tile(x, 2))),
]


@pytest.mark.parametrize("bad", NUMPY, ids=lambda bad: bad.name)
def test_bad_calls_of_a_numpy_state_are_refused(bad):
    this = bench("reference", 2, numpy=True)
    before = bits_of(this.state)
    with pytest.raises(bad.error, match=rf"^{bad.argument}: "):
        this.manager.attend(**{"state": this.state, **this.call, **bad.change(this)})
    assert bits_of(this.state) == before


CONFIG, MAPS = small_config(), random_maps(small_config())
MANAGERS = {
    "config-is-a-dict": ("config", TypeError, {"config": {}}),
    "config-is-none": ("config", TypeError, {"config": None}),
    "backend-unknown": ("backend", ValueError, {"backend": "cuda"}),
    "backend-is-none": ("backend", ValueError, {"backend": None}),
    "maps-missing": ("maps", ValueError, {"maps": None}),
    "maps-is-a-dict": ("maps", TypeError, {"maps": {}}),
    "maps-is-a-list": ("maps", TypeError, {"maps": list(MAPS)}),
    "maps-for-rank-0": ("maps", ValueError, {"config": small_config(rank=0)}),
    "maps-of-other-layers": ("maps", ValueError, {"config": small_config(num_layers=3)}),
    "maps-of-other-heads": ("maps", ValueError, {"config": small_config(query_heads=6)}),
    "maps-of-other-kv-heads": ("maps", ValueError, {"config": small_config(kv_heads=4)}),
    "maps-of-other-head-dim": ("maps", ValueError, {"config": small_config(head_dim=8)}),
    "maps-of-other-rank": ("maps", ValueError, {"config": small_config(rank=3)}),
    "maps-of-other-hidden": ("maps", ValueError, {"config": small_config(hidden=64)}),
}


@pytest.mark.parametrize(("argument", "error", "change"), MANAGERS.values(), ids=MANAGERS)
def test_what_does_not_go_together_makes_no_manager(argument, error, change):
    with pytest.raises(error, match=rf"^{argument}: "):
        lc.CacheManager(**{"config": CONFIG, "maps": MAPS, **change})


INITS = {
    "batch-of-none": ("batch_size", ValueError, {"batch_size": 0}),
    "batch-negative": ("batch_size", ValueError, {"batch_size": -1}),
    "batch-beyond-memory": ("batch_size", ValueError, {"batch_size": 10**9}),
    "batch-beyond-counting": ("batch_size", ValueError, {"batch_size": 2**31, "device": "meta"}),
    "batch-is-a-float": ("batch_size", TypeError, {"batch_size": 2.0}),
    "device-without-a-driver": ("device", ValueError, {"batch_size": 1, "device": "hpu"}),
    "batch-is-a-bool": ("batch_size", TypeError, {"batch_size": True}),
    "dtype-is-an-integer-dtype": ("dtype", ValueError, {"dtype": torch.int32}),
    "dtype-is-a-word": ("dtype", ValueError, {"dtype": "double"}),
    "dtype-of-numpy-on-torch": ("dtype", ValueError, {"dtype": np.float32}),
    "dtype-of-numpy-instance": ("dtype", ValueError, {"dtype": np.dtype("float64")}),
}


@pytest.mark.parametrize(("argument", "error", "call"), INITS.values(), ids=INITS)
def test_a_state_that_cannot_be_is_not_made(argument, error, call):
    with pytest.raises(error, match=rf"^{argument}: "):
        lc.CacheManager(CONFIG, MAPS, backend="torch").init(**{"batch_size": 1, **call})


def test_a_numpy_state_has_no_device():
    manager = lc.CacheManager(CONFIG, MAPS, backend="reference")
    with pytest.raises(ValueError, match=r"^device: "):
        manager.init(1, dtype=np.float32, device="cpu")


STATE_CALLS = {
    "reorder-too-few": ("rows", ValueError, lambda state: state.reorder([0, 1])),
    "reorder-too-many": ("rows", ValueError, lambda state: state.reorder([0, 1, 2, 0])),
    "reorder-too-high": ("rows", ValueError, lambda state: state.reorder([0, 1, 3])),
    "reorder-negative": ("rows", ValueError, lambda state: state.reorder([0, 1, -1])),
    "reorder-floats": ("rows", TypeError, lambda state: state.reorder([0.0, 1.0, 2.0])),
    "reorder-bools": ("rows", TypeError, lambda state: state.reorder([True, False, True])),
    "reorder-float-tensor": ("rows", TypeError, lambda state: state.reorder(torch.zeros(3))),
    "reorder-2-dims": ("rows", ValueError, lambda state: state.reorder([[0, 1, 2]])),
    "reorder-scalar": ("rows", ValueError, lambda state: state.reorder(0)),
    "reorder-text": ("rows", TypeError, lambda state: state.reorder("abc")),
    "select-nothing": ("rows", ValueError, lambda state: state.select([])),
    "select-too-high": ("rows", ValueError, lambda state: state.select([3])),
    "select-floats": ("rows", TypeError, lambda state: state.select([0.5])),
    "repeat-0": ("count", ValueError, lambda state: state.repeat(0)),
    "repeat-a-float": ("count", TypeError, lambda state: state.repeat(2.0)),
    "repeat-a-bool": ("count", TypeError, lambda state: state.repeat(True)),
}


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize(("argument", "error", "call"), STATE_CALLS.values(), ids=STATE_CALLS)
def test_bad_rows_are_refused_and_change_nothing(argument, error, call, numpy):
    state = bench("reference", 1, numpy=numpy).state
    before = bits_of(state)
    with pytest.raises(error, match=rf"^{argument}: "):
        call(state)
    assert bits_of(state) == before


def test_there_are_at_least_sixty_ways_to_be_refused():
    tables = (APPEND, NUMPY, MANAGERS, INITS, STATE_CALLS)
    assert sum(map(len, tables)) >= 60


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_full_cache_refuses_what_it_has_no_room_for(backend, tokens):
    this = bench(backend, tokens, policy=lc.FullCache(), capacity=7)
    if tokens == 1:
        this.manager.attend(this.state, **this.call)
    before = bits_of(this.state)
    with pytest.raises(ValueError, match=r"^k: 8 tokens in all, but FullCache.*capacity = 7"):
        this.manager.attend(this.state, **this.call)
    assert bits_of(this.state) == before


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_takes_no_room_in_a_full_cache(backend):
    this = bench(backend, 3, policy=lc.FullCache(), capacity=8)
    for _ in range(5):
        this.manager.attend(this.state, **{**this.call, "mask": torch.zeros(BATCH, 3).bool()})
    one = torch.tensor([[False, True, False]]).expand(BATCH, 3)
    this.manager.attend(this.state, **{**this.call, "mask": one})
    this.manager.attend(this.state, **{**this.call, "mask": one})
    with pytest.raises(ValueError, match=r"^k: 9 tokens"):
        this.manager.attend(this.state, **{**this.call, "mask": one})
    assert this.state.layers[0].length.tolist() == [8] * BATCH


def test_a_moved_row_brings_its_length_to_a_full_cache():
    config = small_config(policy=lc.FullCache(), capacity=4, rank=0, num_layers=1)
    manager = lc.CacheManager(config)
    state = manager.init(2)
    q, k, v = torch_inputs(config, 2, 4)
    manager.attend(state, 0, q, k, v, torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]))
    state.reorder([1, 1])
    for token in range(3):
        manager.attend(state, 0, *(x[:, :, token : token + 1] for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"^k: 5 tokens"):
        manager.attend(state, 0, *(x[:, :, :1] for x in (q, k, v)))
    state.reset()
    manager.attend(state, 0, q, k, v)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_masks_of_booleans_and_of_zeros_and_ones_mean_the_same(dtype):
    outs = []
    for kind in (torch.bool, dtype):
        this = bench("torch", 4)
        mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).to(kind)
        outs.append(this.manager.attend(this.state, **{**this.call, "mask": mask}))
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_inputs_are_left_as_they_were(backend):
    this = bench(backend, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    copies = {name: this.call[name].clone() for name in ("q", "k", "v")}
    this.manager.attend(this.state, **{**this.call, "mask": mask})
    for name, copy in copies.items():
        assert torch.equal(this.call[name], copy)


def test_auto_takes_torch_and_the_reference_for_a_users_own_policy():
    class Mine(lc.KeyNorm):
        def initial_scores(self, xp, keys, positions):
            return xp.zeros_like(keys[..., 0])

    assert lc.CacheManager(CONFIG, MAPS).backend_on("cpu") == "torch"
    assert lc.CacheManager(small_config(policy=Mine()), MAPS).backend_on("cpu") == "reference"
    with pytest.raises(ValueError, match=r"^policy: layer 0"):
        lc.CacheManager(small_config(policy=Mine()), MAPS, backend="torch")


def test_a_state_goes_from_one_backend_to_the_other():
    managers = [lc.CacheManager(CONFIG, MAPS, backend=name) for name in ("torch", "reference")]
    state, alone = managers[0].init(2), managers[0].init(2)
    for turn, tokens in enumerate((5, 1, 4, 1, 1)):
        inputs = torch_inputs(CONFIG, 2, tokens, seed=turn)
        out = managers[turn % 2].attend(state, 0, *inputs)
        torch.testing.assert_close(out, managers[0].attend(alone, 0, *inputs))


def test_a_numpy_state_stays_with_the_reference():
    reference = lc.CacheManager(CONFIG, MAPS, backend="reference")
    state = reference.init(2, dtype=np.float32)
    before = bits_of(state)
    arrays = [array.numpy() for array in torch_inputs(CONFIG, 2, 1)]
    with pytest.raises(ValueError, match=r"^state: .*NumPy"):
        lc.CacheManager(CONFIG, MAPS, backend="torch").attend(state, 0, *arrays)
    assert bits_of(state) == before
    reference.attend(state, 0, *arrays)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_state_has_the_dtype_it_was_asked_for(dtype):
    state = lc.CacheManager(CONFIG, MAPS).init(2, dtype=dtype)
    layer = state.layers[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.keys.dtype == layer.values.dtype == dtype
    assert layer.scores.dtype == layer.H.dtype == layer.z.dtype == wide
    assert layer.positions.dtype == layer.length.dtype == torch.int32
    assert state.config.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", ["paper", "exp"])
def test_the_state_of_many_tokens_is_float64s(kind):
    # This policy evicts by numbers that float32 holds exactly, so no set can differ.
    config = lc.CacheConfig(1, 2, 1, 4, 8, lc.SinkWindow(), rank=4)
    maps = random_maps(config, kind)
    states = []
    for dtype in (torch.float32, torch.float64):
        manager = lc.CacheManager(config, maps, backend="torch")
        state = manager.init(1, dtype=dtype)
        rng = np.random.default_rng(0)
        for tokens in (*[1000] * 18, *[1] * 2000):
            inputs = random_inputs(config, 1, tokens, rng)
            manager.attend(state, 0, *(torch.as_tensor(x, dtype=dtype) for x in inputs))
        states.append(state.layers[0])
    found, exact = states
    assert found.length.tolist() == [20_000]
    assert found.H.dtype == torch.float32
    torch.testing.assert_close(found.z.double(), exact.z, rtol=1e-4, atol=0)
    off = (found.H.double() - exact.H).abs().max() / exact.H.abs().max()
    assert float(off) < 1e-4


def test_float32_holds_a_running_sum_of_a_million():
    terms = np.random.default_rng(0).exponential(size=10**6).astype(np.float32)
    # `accumulate` adds one after another, as steps do.
    running = np.add.accumulate(terms, dtype=np.float32)[-1]
    assert running == pytest.approx(terms.sum(dtype=np.float64), rel=1e-4)


def test_length_counts_tokens_of_each_row():
    this = bench("torch", 3)
    assert this.state.length.tolist() == [6, 6, 6]
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    for layer in range(2):
        this.manager.attend(this.state, **{**this.call, "layer": layer, "mask": mask})
    assert this.state.length.tolist() == [9, 7, 6]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autograd_does_not_reach_into_the_state(backend):
    config = small_config()
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state = manager.init(1)
    for tokens in (9, 1, 1):
        inputs = [x.requires_grad_() for x in torch_inputs(config, 1, tokens)]
        assert not manager.attend(state, 0, *inputs).requires_grad
    assert not any(array.requires_grad for array in state.layers[0].arrays().values())


def test_representations_say_what_they_are():
    manager = lc.CacheManager(CONFIG, MAPS)
    assert "auto" in repr(manager)
    assert "batch_size=2" in repr(manager.init(2))
