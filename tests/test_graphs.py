"""A captured step against the same step uncaptured; tapes stand in for CUDA graphs."""

import numpy as np
import pytest
import torch

import less_cache as lc
from tests.policies import MostSeen
from tests.tape import use_tapes

pytest.importorskip("triton")

LAYERS, HEADS, SIZE = 2, 1, 16


@pytest.fixture
def tapes(monkeypatch):
    return use_tapes(monkeypatch)


def cache(policy=None, *, rank=3, batch=2, capacity=4, **given):
    config = lc.CacheConfig(
        LAYERS,
        2 * HEADS,
        HEADS,
        SIZE,
        capacity=capacity,
        policy=policy or lc.H2O(recent=2),
        rank=rank,
        **given,
    )
    maps = lc.FeatureMaps.initialise(config, hidden=8, generator=seeded()) if rank else None
    manager = lc.CacheManager(config, maps, backend="triton")
    return manager, manager.init(batch)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model(manager, state):
    """Two layers of attention alone, with a number of each step's own."""
    generator = seeded(1)
    weights = torch.randn(LAYERS, 4, SIZE, SIZE, generator=generator) / 4

    def step(x, positions, mask=None):
        x = x + positions[:, None, None, None].sin()
        for layer in range(LAYERS):
            q, k, v = (x @ weights[layer, i] for i in range(3))
            out = manager.attend(state, layer, q, k[:, :HEADS], v[:, :HEADS], mask)
            x = (x + out @ weights[layer, 3]).tanh()
        return x

    return step


def inputs(turn, masked=False, batch=2):
    x = torch.randn(batch, 2 * HEADS, 1, SIZE, generator=seeded(100 + turn))
    mask = torch.tensor([[True], [turn % 3 > 0]])[:batch]
    return (x, torch.full((batch,), float(turn)), *([mask] if masked else []))


def same(one, other):
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for name, array in mine.arrays().items():
            assert torch.equal(array, theirs.arrays()[name]), name


@pytest.mark.parametrize(
    ("policy", "masked", "given"),
    [
        (lc.H2O(recent=2), True, {}),
        (lc.Scissorhands(window=4), False, {"rank": 0, "quantization": lc.Quantization(4, 4)}),
    ],
    ids=["H2O, masked", "Scissorhands, codes"],
)
def test_tokens_are_those_of_the_uncaptured_loop(tapes, policy, masked, given):
    manager, state = cache(policy, **given)
    _, plain = cache(policy, **given)
    captured = lc.CapturedStep(manager, state, model(manager, state))
    step = model(manager, plain)
    for turn in range(6):
        got, wanted = captured(*inputs(turn, masked)), step(*inputs(turn, masked))
        assert torch.equal(got, wanted), turn
        same(state, plain)
    (tape,) = tapes
    assert tape.replays == 5
    assert [x.tokens_bound for x in state.layers] == [x.tokens_bound for x in plain.layers]


def test_prompts_resets_and_reorders_between_replays(tapes):
    manager, state = cache()
    _, plain = cache()
    captured = lc.CapturedStep(manager, state, model(manager, state))
    step = model(manager, plain)
    for turn in range(6):
        if turn == 2:
            for one in (state, plain):
                one.reset()
                q = torch.randn(2, 2 * HEADS, 9, SIZE, generator=seeded(7))
                for layer in range(LAYERS):
                    manager.attend(one, layer, q, q[:, :HEADS], q[:, HEADS:])
        if turn == 4:
            state.reorder([1, 0])
            plain.reorder([1, 0])
        assert torch.equal(captured(*inputs(turn)), step(*inputs(turn)))
    same(state, plain)


def test_a_full_cache_is_noticed_though_no_python_runs(tapes):
    manager, state = cache(lc.FullCache(), rank=0, capacity=4)
    captured = lc.CapturedStep(manager, state, model(manager, state))
    for turn in range(4):
        captured(*inputs(turn))
    before = state.clone()
    with pytest.raises(ValueError, match="FullCache holds at most capacity = 4"):
        captured(*inputs(4))
    same(state, before)
    state.reset()
    captured(*inputs(0))


def test_what_waits_for_the_device_cannot_be_captured(tapes):
    manager, state = cache()
    inner = model(manager, state)
    captured = lc.CapturedStep(manager, state, lambda *x: inner(*x) * float(x[1].max()))
    captured(*inputs(0))
    before = state.clone()
    with pytest.raises(RuntimeError, match="step: cannot be captured"):
        captured(*inputs(1))
    same(state, before)
    assert [x.tokens_bound for x in state.layers] == [1] * LAYERS


def test_results_are_the_callers_own(tapes):
    manager, state = cache(batch=1)
    inner = model(manager, state)
    captured = lc.CapturedStep(manager, state, lambda *x: (inner(*x), x[1]))
    found = [captured(*inputs(turn, batch=1)) for turn in range(4)]
    assert [float(number) for _, number in found] == [0, 1, 2, 3]


def test_other_inputs_than_the_first_are_refused(tapes):
    manager, state = cache()
    captured = lc.CapturedStep(manager, state, model(manager, state))
    captured(*inputs(0))
    x, positions = inputs(1)
    for given, reason in [
        ((x[:1], positions[:1]), "another batch"),
        ((x.double(), positions), "another batch"),
        ((x,), "another batch"),
        ((x, 3), r"inputs\[1\]: got int"),
        ((x.to("meta"), positions), "on device meta"),
    ]:
        with pytest.raises((ValueError, TypeError), match=reason):
            captured(*given)
    assert state.length.tolist() == [1, 1]


def test_steps_that_are_none_are_refused(tapes):
    manager, state = cache()
    q = torch.zeros(2, 2 * HEADS, 1, SIZE)

    def first_layer_alone(x):
        return manager.attend(state, 0, x, q[:, :HEADS], q[:, :HEADS])

    with pytest.raises(ValueError, match=r"attended from \[1, 0\] new tokens"):
        lc.CapturedStep(manager, state, first_layer_alone)(q)
    with pytest.raises(TypeError, match="step: returned str"):
        lc.CapturedStep(manager, state, lambda: "text")()


def test_what_has_no_graph_is_refused(monkeypatch):
    manager, state = cache()
    with pytest.raises(ValueError, match="state: on 'cpu', but a CUDA graph needs a CUDA device"):
        lc.CapturedStep(manager, state, len)
    use_tapes(monkeypatch)
    config = manager.config
    for other, made, reason in [
        (lc.CacheManager(config, manager.maps, backend="torch"), {}, "backend: got 'torch'"),
        (lc.CacheManager(config, manager.maps, backend="reference"), {}, "backend: got 'ref"),
        (lc.CacheManager(config, manager.maps), {"dtype": np.float32}, "state: holds NumPy"),
    ]:
        with pytest.raises(ValueError, match=reason):
            lc.CapturedStep(other, other.init(1, **made), len)
    own = lc.CacheManager(lc.CacheConfig(1, 2, 1, 16, capacity=4, policy=MostSeen(), rank=0))
    with pytest.raises(ValueError, match="policy: layer 0 has MostSeen"):
        lc.CapturedStep(own, own.init(1), len)
    for wrong in [(None, state, len), (manager, None, len), (manager, state, None)]:
        with pytest.raises(TypeError, match="got NoneType"):
            lc.CapturedStep(*wrong)
