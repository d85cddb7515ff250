"""A decode step compiles whole, compiles once, and never waits for the device."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import less_cache as lc
from tests.helpers import POLICIES, bits_of, policy_id, random_maps, small_config, torch_inputs

STEPS = 9


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def make(policy, **changes):
    capacity = 40 if policy_id(policy) == "FullCache" else 6
    config = small_config(policy=policy, capacity=capacity, **changes)
    kind = "paper" if policy_id(policy) in ("H2O", "KeyNorm") else "exp"
    manager = lc.CacheManager(config, random_maps(config, kind), backend="torch")
    states = [manager.init(3) for _ in range(2)]
    for state in states:
        for layer in range(2):
            manager.attend(state, layer, *torch_inputs(config, 3, 4))
    return manager, *states


def step_of(manager, state):
    def step(q, k, v, mask):
        first = manager.attend(state, 0, q, k, v, mask)
        return manager.attend(state, 1, first, k, v, mask)

    return step


def inputs_of(manager, turn, masked):
    q, k, v = torch_inputs(manager.config, 3, 1, seed=turn)
    mask = torch.tensor([[True], [turn % 2 == 0], [turn > 3]]) if masked else None
    return q, k, v, mask


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_compiled_step_equals_an_eager_one_and_is_compiled_once(policy, masked):
    manager, eager, compiled = make(policy)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(step_of(manager, compiled), fullgraph=True, backend=counter)
    for turn in range(STEPS):
        inputs = inputs_of(manager, turn, masked)
        expected = step_of(manager, eager)(*inputs)
        torch.testing.assert_close(step(*inputs), expected)
        assert counter.frame_count == 1
    for one, other in zip(eager.layers, compiled.layers, strict=True):
        for name, array in one.arrays().items():
            torch.testing.assert_close(other.arrays()[name], array, msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_step():
    manager, eager, compiled = make(lc.H2O())
    step = torch.compile(
        lambda *inputs: manager.attend(compiled, 0, *inputs), fullgraph=True, backend="inductor"
    )
    for turn in range(STEPS):
        inputs = inputs_of(manager, turn, masked=True)
        expected = manager.attend(eager, 0, *inputs)
        torch.testing.assert_close(step(*inputs), expected, rtol=1e-4, atol=1e-5)


class NoHostSync(TorchDispatchMode):
    """Fails on every operator whose result the host must wait for."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "equal",
        "allclose",
        "unique",
        "bincount",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        plain = name.partition(".")[0]
        if name in self.FORBIDDEN or plain in self.FORBIDDEN or plain.startswith("_unique"):
            raise AssertionError(f"{name} waits for the device")
        if plain in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise AssertionError(f"{name} by booleans waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_step_never_waits_for_the_device(policy, masked):
    manager, state, _ = make(policy)
    for turn in range(STEPS):
        inputs = inputs_of(manager, turn, masked)
        with NoHostSync():
            step_of(manager, state)(*inputs)


def test_the_guard_against_waiting_works():
    for bad in (
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: int(x[0]),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
            bad(torch.ones(3))


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_step_needs_no_data_at_all(policy, mask_type):
    # On the meta device there are no numbers that a host could wait for.
    manager, state, _ = make(policy)
    state = state.to("meta")
    *tokens, mask = (x.to("meta") for x in inputs_of(manager, 0, masked=True))
    out = step_of(manager, state)(*tokens, mask.to(mask_type))
    assert out.device.type == "meta"
    assert out.shape == (3, 4, 1, 4)


def test_a_full_cache_that_was_filled_while_compiled_still_refuses_the_next_token():
    config = small_config(policy=lc.FullCache(), capacity=6, rank=0, num_layers=1)
    manager = lc.CacheManager(config, backend="torch")
    state = manager.init(2)
    manager.attend(state, 0, *torch_inputs(config, 2, 3))
    step = torch.compile(
        lambda q, k, v: manager.attend(state, 0, q, k, v), fullgraph=True, backend="aot_eager"
    )
    one = torch_inputs(config, 2, 1)
    for _ in range(3):
        step(*one)
    before = bits_of(state)
    with pytest.raises(RuntimeError, match="FullCache holds at most capacity = 6"):
        step(*one)
    with pytest.raises(ValueError, match=r"^k: 7 tokens in all"):
        manager.attend(state, 0, *one)
    assert bits_of(state) == before


def test_positions_of_16_bits_do_not_wrap_while_compiled():
    codes = {"quantization": lc.Quantization(3, 3), "max_positions": 2**15}
    config = small_config(policy=lc.SinkWindow(), capacity=8, rank=0, num_layers=1, **codes)
    manager = lc.CacheManager(config, backend="torch")
    state = manager.init(2)
    manager.attend(state, 0, *torch_inputs(config, 2, 12))
    held = state.layers[0]
    held.positions[held.positions >= 4] += 2**15 - 13
    held.length += 2**15 - 13
    step = torch.compile(
        lambda q, k, v: manager.attend(state, 0, q, k, v), fullgraph=True, backend="aot_eager"
    )
    one = torch_inputs(config, 2, 1)
    step(*one)
    assert held.positions.max() == 2**15 - 1
    before = bits_of(state)
    with pytest.raises(RuntimeError, match=r"more tokens than 32768: .* 16-bit numbers"):
        step(*one)
    assert bits_of(state) == before
