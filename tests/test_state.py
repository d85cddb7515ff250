"""`CacheState`: allocate, reset, move rows, count bytes."""

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.state import EMPTY, allocate
from tests.helpers import as_numpy, bits_of, random_inputs, random_maps, small_config, torch_inputs


@pytest.fixture(params=["torch", "numpy"])
def used(request):
    """A manager and a state of three rows of different lengths."""
    config = small_config(policy=[lc.H2O(), lc.Scissorhands(window=4)], capacity=[5, 7])
    manager = lc.CacheManager(config, random_maps(config), backend="reference")
    state = manager.init(3, dtype=np.float32 if request.param == "numpy" else None)
    rng = np.random.default_rng(0)
    mask = np.arange(9)[None, :] >= np.array([[0], [4], [9]])
    for layer in range(2):
        arrays = [array.astype(np.float32) for array in random_inputs(config, 3, 9, rng)]
        given = [*arrays, mask]
        if request.param == "torch":
            given = [torch.as_tensor(array) for array in given]
        manager.attend(state, layer, *given)
    return manager, state


def arrays_of(state):
    return [
        {name: as_numpy(array).copy() for name, array in layer.arrays().items()}
        for layer in state.layers
    ]


def assert_rows(state, before, rows):
    for layer, old in zip(arrays_of(state), before, strict=True):
        assert layer.keys() == old.keys()
        for name, array in layer.items():
            np.testing.assert_array_equal(array, old[name][rows], err_msg=name)


@pytest.mark.parametrize("numpy", [False, True])
def test_a_new_layer_is_empty(numpy):
    config = small_config(policy=lc.Scissorhands(), dtype="float16")
    layer = allocate(config.layer(0), 3, numpy=numpy)
    assert tuple(layer.keys.shape) == tuple(layer.values.shape) == (3, 12, 4)
    assert tuple(layer.scores.shape) == tuple(layer.positions.shape) == (3, 12)
    assert tuple(layer.history.shape) == (3, 12)
    assert tuple(layer.H.shape) == (3, 2, 2, 4)
    assert tuple(layer.z.shape) == (3, 2, 2)
    assert tuple(layer.length.shape) == (3,)
    for name, array in layer.arrays().items():
        assert (as_numpy(array) == (EMPTY if name == "positions" else 0)).all(), name
    assert isinstance(layer.keys, np.ndarray) == numpy


def test_only_a_policy_that_looks_back_has_a_history():
    state = lc.CacheManager(small_config(policy=[lc.H2O(), lc.Scissorhands()], rank=0)).init(1)
    assert state.layers[0].history is None
    assert "history" not in state.layers[0].arrays()
    assert state.layers[1].history is not None


def test_bytes_are_those_of_all_arrays(used):
    manager, state = used
    total = sum(a.nbytes for layer in state.layers for a in layer.arrays().values())
    assert state.nbytes == total == 3 * manager.config.bytes_per_sequence()
    assert state.layers[0].nbytes + state.layers[1].nbytes == state.nbytes


def test_lengths_and_sizes_are_told(used):
    _, state = used
    assert as_numpy(state.length).tolist() == [9, 5, 0]
    assert state.batch_size == 3
    assert repr(state).startswith("CacheState(batch_size=3, num_layers=2")


def test_reset_forgets_everything_in_place(used):
    manager, state = used
    arrays = [layer.arrays() for layer in state.layers]
    state.reset()
    new = manager.init(3, dtype=np.float32 if state.is_numpy else None)
    assert bits_of(state) == bits_of(new)
    assert [layer.tokens_bound for layer in state.layers] == [0, 0]
    for old, layer in zip(arrays, state.layers, strict=True):
        assert all(layer.arrays()[name] is array for name, array in old.items())


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1, 0], [1, 1, 1], [1, 2, 0], [2, 2, 0]])
@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor], ids=lambda m: m.__name__)
def test_reorder_moves_rows_in_place(used, rows, make):
    _, state = used
    before = arrays_of(state)
    arrays = [layer.arrays() for layer in state.layers]
    state.reorder(make(rows))
    assert_rows(state, before, rows)
    for old, layer in zip(arrays, state.layers, strict=True):
        assert all(layer.arrays()[name] is array for name, array in old.items())


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 0, 2, 2]])
def test_select_makes_a_state_of_those_rows(used, rows):
    manager, state = used
    before, bits = arrays_of(state), bits_of(state)
    chosen = state.select(rows)
    assert_rows(chosen, before, rows)
    assert chosen.batch_size == len(rows)
    assert chosen.config is state.config
    chosen.reset()
    assert bits_of(state) == bits, "a selected state shares no memory with its origin"
    assert chosen.maps is manager.maps


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([3], ValueError, "rows: got rows 3 to 3, expected 0 to 2"),
        ([0, -1], ValueError, "rows: got rows -1 to 0, expected 0 to 2"),
        ([], ValueError, r"rows: got shape \(0,\), expected one dimension"),
        ([[0]], ValueError, r"rows: got shape \(1, 1\), expected one dimension"),
        ([0.0], TypeError, "rows: got dtype float64, expected integers"),
    ],
)
def test_rows_that_are_not_there_are_refused(used, rows, error, message):
    _, state = used
    bits = bits_of(state)
    for call in (state.select, state.reorder):
        with pytest.raises(error, match=message):
            call(rows)
    assert bits_of(state) == bits


def test_repeat_puts_copies_of_a_row_together(used):
    _, state = used
    before = arrays_of(state)
    assert_rows(state.repeat(2), before, [0, 0, 1, 1, 2, 2])
    assert_rows(state.repeat(1), before, [0, 1, 2])
    assert state.repeat(1).layers[0].keys is not state.layers[0].keys


def test_to_copies_a_torch_state_and_refuses_a_numpy_one(used):
    manager, state = used
    if state.is_numpy:
        with pytest.raises(TypeError, match=r"^device: "):
            state.to("cpu")
        return
    bits = bits_of(state)
    copy = state.to("cpu")
    assert bits_of(copy) == bits
    inputs = [torch.ones(3, heads, 1, 4) for heads in (4, 2, 2)]
    out = manager.attend(copy, 0, *inputs)
    assert bits_of(state) == bits, "a copy shares no memory with its origin"
    assert torch.equal(manager.attend(state, 0, *inputs), out)
    assert state.to("meta").layers[0].keys.device.type == "meta"
    assert [layer.tokens_bound for layer in copy.layers] == [
        layer.tokens_bound for layer in state.layers
    ]


@pytest.mark.parametrize(
    ("device", "error"),
    [
        (3.5, TypeError),
        (True, TypeError),
        (None, TypeError),
        ("banana", ValueError),
        ("cpu:9", ValueError),
        ("cuda:99", ValueError),
    ],
)
def test_a_device_that_is_none_is_refused(device, error):
    manager = lc.CacheManager(small_config(rank=0))
    with pytest.raises(error, match=r"^device: got"):
        manager.init(1).to(device)
    if device is not None:
        with pytest.raises(error, match=r"^device: got"):
            manager.init(1, device=device)
    assert manager.init(1, device="cpu:0").to(torch.device("cpu")).batch_size == 1


@pytest.mark.parametrize("policy", [lc.SinkWindow(), lc.H2O(), lc.FullCache()], ids=str)
def test_tokens_are_counted_without_the_device(policy, tmp_path):
    config = lc.CacheConfig(2, 4, 2, 4, 12, policy, rank=0)
    manager = lc.CacheManager(config)
    state = manager.init(2)
    for tokens in (3, 1, 4):
        for layer in range(2):
            manager.attend(state, layer, *torch_inputs(config, 2, tokens))
    state.save(tmp_path / "state")
    copies = [state, state.select([1]), state.to("cpu"), manager.load(tmp_path / "state")]
    state.reorder([1, 0])
    assert [[layer.tokens_bound for layer in copy.layers] for copy in copies] == [[8, 8]] * 4
    # Padding counts at first, and no longer when it matters.
    mask = torch.tensor([[False, True]] * 2)
    manager.attend(state, 0, *torch_inputs(config, 2, 2), mask)
    assert state.layers[0].tokens_bound == 10
    state.layers[0].tokens_bound = 2**31
    manager.attend(state, 0, *torch_inputs(config, 2, 1))
    assert state.layers[0].tokens_bound == 10
