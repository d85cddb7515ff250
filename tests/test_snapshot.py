"""Snapshots: a resumed cache goes on bit for bit; a file that is not ours is refused."""

import json
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import less_cache as lc
from less_cache import _tensor_files
from less_cache._tensor_files import write_tensors
from less_cache.snapshot import FORMAT
from tests.helpers import POLICIES, bits_of, policy_id, random_inputs, random_maps, small_config
from tests.quantization.fitted import fitted

KINDS = {
    "torch": ("torch", torch.float32),
    "torch-half": ("torch", torch.float16),
    "torch-bfloat16": ("torch", torch.bfloat16),
    "reference": ("reference", torch.float32),
    "numpy": ("reference", np.float64),
}


def append(manager, state, tokens, seed, masked=False):
    """Append the same numbers to every layer of any kind of state, and return the outputs."""
    rng = np.random.default_rng(seed)
    outs = []
    for layer in range(manager.config.num_layers):
        arrays = random_inputs(manager.config, state.batch_size, tokens, rng)
        mask = rng.random((state.batch_size, tokens)) < 0.7 if masked else None
        if state.is_numpy:
            given = [array.astype(state.config.dtype) for array in arrays]
        else:
            dtype = getattr(torch, state.config.dtype)
            given = [torch.as_tensor(array).to(dtype) for array in arrays]
            mask = None if mask is None else torch.as_tensor(mask)
        outs.append(manager.attend(state, layer, *given, mask))
    return outs


def make(kind="torch", **changes):
    backend, dtype = KINDS[kind]
    config = small_config(**changes)
    manager = lc.CacheManager(config, random_maps(config), backend=backend)
    state = manager.init(3, dtype=dtype)
    append(manager, state, 9, seed=1, masked=True)
    append(manager, state, 1, seed=2)
    return manager, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_state_goes_on_bit_for_bit(tmp_path, kind, policy, rank):
    capacity = 40 if policy_id(policy) == "FullCache" else 6
    manager, state = make(kind, policy=policy, capacity=capacity, rank=rank)
    state.save(tmp_path / "cache.safetensors")
    resumed = manager.load(tmp_path / "cache.safetensors")
    assert bits_of(resumed) == bits_of(state)
    assert resumed.config == state.config
    for turn, tokens in enumerate((1, 4, 1, 1)):
        first = append(manager, state, tokens, seed=10 + turn)
        second = append(manager, resumed, tokens, seed=10 + turn)
        assert all(
            np.array_equal(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)
        )
        assert bits_of(resumed) == bits_of(state)


@pytest.mark.parametrize("kind", ["torch", "torch-bfloat16", "numpy"])
def test_layers_of_other_ranks_and_bits_go_on_bit_for_bit(tmp_path, kind):
    backend, dtype = KINDS[kind]
    codes = [None, lc.Quantization(3, 3), lc.Quantization(4, 4, "calibrated")]
    config = small_config(num_layers=3, head_dim=16, rank=[2, 0, 3], quantization=codes)
    parts = {"backend": backend, "transforms": fitted(config)}
    manager = lc.CacheManager(config, random_maps(config), **parts)
    state = manager.init(3, dtype=dtype)
    append(manager, state, 9, seed=1, masked=True)
    state.save(tmp_path / "cache")
    resumed = manager.load(tmp_path / "cache")
    for tokens in (1, 4, 1):
        append(manager, state, tokens, seed=tokens)
        append(manager, resumed, tokens, seed=tokens)
    assert bits_of(resumed) == bits_of(state)
    beams = state.select([2, 0, 0])
    state.reorder([2, 0, 0])
    assert bits_of(beams) == bits_of(state)
    assert state.nbytes == 3 * state.config.bytes_per_sequence()
    for changes in ({"rank": 2}, {"quantization": codes[1]}, {"rank": [2, 2, 3]}):
        with pytest.raises(
            ValueError, match=f"made with another config: .*{next(iter(changes))} is"
        ):
            lc.CacheState.load(tmp_path / "cache", config.replace(**changes))


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_state_loaded_without_a_manager_goes_on_as_well(tmp_path, kind):
    manager, state = make(kind)
    state.save(tmp_path / "cache")
    resumed = lc.CacheState.load(tmp_path / "cache", maps=manager.maps)
    first, second = (append(manager, s, 3, seed=5) for s in (state, resumed))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_process_can_load_maps_of_the_same_numbers(tmp_path):
    manager, state = make()
    state.save(tmp_path / "cache")
    twin = lc.CacheManager(small_config(), random_maps(small_config()))
    assert twin.maps is not manager.maps
    resumed = twin.load(tmp_path / "cache")
    first, second = append(manager, state, 1, 7), append(twin, resumed, 1, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_full_cache_still_counts_after_loading(tmp_path):
    manager, state = make(policy=lc.FullCache(), capacity=11, rank=0, num_layers=1)
    state.save(tmp_path / "cache")
    resumed = manager.load(tmp_path / "cache")
    room = 11 - int(state.length.max())
    for step in range(room):
        append(manager, resumed, 1, seed=step)
    with pytest.raises(ValueError, match=r"^k: 12 tokens"):
        append(manager, resumed, 1, seed=99)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    manager, _ = make()
    with pytest.raises(FileNotFoundError, match="no such snapshot"):
        manager.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such snapshot"):
        manager.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="truncated, or not a safetensors file"):
        manager.load(path)


@pytest.mark.parametrize("content", [b"hello", b"\x80\x04N.", b"\xff" * 4096, b"\x00" * 64])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    manager, _ = make()
    path = tmp_path / "cache"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cache"):
        manager.load(path)


def test_foreign_safetensors_are_refused(tmp_path):
    manager, _ = make()
    path = tmp_path / "cache"
    for metadata in (None, {"format": "pt"}, {"format": "less_cache.snapshot.0"}):
        save_file({"weight": torch.zeros(2)}, str(path), metadata=metadata)
        with pytest.raises(ValueError, match="not a cache snapshot"):
            manager.load(path)
    save_file({"weight": torch.zeros(2)}, str(path), metadata={"format": FORMAT})
    with pytest.raises(ValueError, match="header lacks"):
        manager.load(path)


OTHER_CONFIGS = {
    "capacity": {"capacity": 7},
    "policy": {"policy": lc.TOVA()},
    "recent": {"policy": lc.H2O(recent=1)},
    "num_layers": {"num_layers": 3},
    "query_heads": {"query_heads": 2},
    "rank": {"rank": 0},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 30.0},
    "state_dtype": {"state_dtype": "float64"},
}


@pytest.mark.parametrize("changes", OTHER_CONFIGS.values(), ids=OTHER_CONFIGS)
def test_a_snapshot_of_another_config_is_refused_and_the_difference_named(tmp_path, changes):
    _, state = make()
    state.save(tmp_path / "cache")
    config = small_config(**changes)
    other = lc.CacheManager(config, random_maps(config))
    (name,) = changes
    with pytest.raises(ValueError, match=rf"made with another config: .*{name}"):
        other.load(tmp_path / "cache")


def test_a_snapshot_of_other_maps_is_refused(tmp_path):
    manager, state = make()
    state.save(tmp_path / "cache")
    other = lc.CacheManager(manager.config, random_maps(manager.config, seed=1))
    with pytest.raises(ValueError, match="other feature maps"):
        other.load(tmp_path / "cache")
    with pytest.raises(ValueError, match="maps must be given"):
        lc.CacheState.load(tmp_path / "cache")


def test_a_numpy_snapshot_is_refused_where_torch_runs(tmp_path):
    manager, state = make("numpy")
    state.save(tmp_path / "cache")
    other = lc.CacheManager(manager.config, manager.maps, backend="torch")
    with pytest.raises(ValueError, match="NumPy"):
        other.load(tmp_path / "cache")


def test_a_snapshot_keeps_its_dtype_and_takes_no_inputs_of_another(tmp_path):
    manager, state = make("torch-half")
    state.save(tmp_path / "cache")
    resumed = manager.load(tmp_path / "cache")
    assert resumed.layers[0].keys.dtype == torch.float16
    before = bits_of(resumed)
    with pytest.raises(TypeError, match=r"^k: got dtype torch.float32, expected torch.float16"):
        manager.attend(resumed, 0, *(torch.zeros(3, heads, 1, 4) for heads in (4, 2, 2)))
    assert bits_of(resumed) == before


def rewritten(path, change_tensors=None, change_header=None):
    """The snapshot at `path` with its tensors or its header changed."""
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_header:
        change_header(header)
    # Signed anew: what is found is what does not fit, not that something changed.
    header.pop("sha256")
    write_tensors(path, tensors, header)


def put(name, make_tensor):
    return lambda tensors: tensors.__setitem__(name, make_tensor(tensors.get(name)))


DAMAGES = {
    "other-dtype": (put("layers.0.keys", lambda t: t.double()), r"layers\.0\.keys"),
    "wide-positions": (put("layers.1.positions", lambda t: t.long()), r"layers\.1\.positions"),
    "other-shape": (put("layers.1.H", lambda t: t[:, :, :1].contiguous()), r"layers\.1\.H"),
    "other-batch": (put("layers.0.length", lambda t: t[:2].clone()), r"layers\.0"),
    "missing": (lambda tensors: tensors.pop("layers.1.z"), r"layers\.1\.z: found nothing"),
    "missing-length": (lambda tensors: tensors.pop("layers.0.length"), r"layers\.0\.length"),
    "extra": (put("layers.0.more", lambda t: torch.zeros(1)), r"unexpected.*layers\.0\.more"),
    "extra-layer": (put("layers.7.z", lambda t: torch.zeros(1)), r"unexpected.*layers\.7\.z"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_do_not_fit_the_header_are_refused(tmp_path, damage, message):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    rewritten(path, change_tensors=damage)
    with pytest.raises(ValueError, match=message):
        manager.load(path)


def poke(name, index, value):
    def damage(tensors):
        tensors[name][index] = value

    return damage


def twice(tensors):
    positions = tensors["layers.1.positions"]
    positions[0, 1] = positions[0, 0]


IMPOSSIBLE = {
    "nan-key": (poke("layers.0.keys", (1, 2, 3), float("nan")), r"layers\.0\.keys: holds NaN"),
    "nan-value": (poke("layers.1.values", (0, 0, 0), float("nan")), r"layers\.1\.values"),
    "infinite-H": (poke("layers.1.H", (0, 0, 0, 0), float("inf")), r"layers\.1\.H: holds NaN"),
    "nan-score": (poke("layers.0.scores", (0, 0), float("nan")), r"layers\.0\.scores"),
    "negative-z": (poke("layers.0.z", (0, 0, 0), -1.0), r"layers\.0\.z: holds a number below 0"),
    "negative-length": (poke("layers.0.length", 1, -3), r"layers\.0\.length"),
    "position-beyond": (poke("layers.0.positions", (0, 0), 99), r"positions: holds one beyond"),
    "position-below": (poke("layers.0.positions", (0, 0), -2), r"positions: holds a number below"),
    "position-twice": (twice, r"layers\.1\.positions: head 0 holds a position twice"),
}


@pytest.mark.parametrize(("damage", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_cache_can_hold_is_refused(tmp_path, damage, message):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    rewritten(path, change_tensors=damage)
    with pytest.raises(ValueError, match=message):
        manager.load(path)


def test_a_history_of_too_many_bits_is_refused(tmp_path):
    manager, state = make(policy=lc.Scissorhands(window=5))
    state.save(tmp_path / "cache")
    rewritten(tmp_path / "cache", change_tensors=poke("layers.0.history", (0, 0), 2**5))
    with pytest.raises(ValueError, match="history"):
        manager.load(tmp_path / "cache")


@pytest.mark.parametrize(
    "bound", ["3", "[3, null]", '["3", 3]', "[3.5, 3]", "[true, 3]", "[-1, 3]"]
)
def test_a_bound_that_is_no_count_is_refused(tmp_path, bound):
    manager, state = make()
    state.save(tmp_path / "cache")
    rewritten(tmp_path / "cache", change_header=lambda h: h.update(tokens_bound=bound))
    with pytest.raises(ValueError, match="tokens_bound"):
        manager.load(tmp_path / "cache")


def test_a_full_cache_has_not_seen_more_than_its_bound(tmp_path):
    manager, state = make(policy=lc.FullCache(), capacity=11, rank=0)
    state.save(tmp_path / "cache")
    rewritten(tmp_path / "cache", change_header=lambda h: h.update(tokens_bound="[1, 1]"))
    with pytest.raises(ValueError, match="has seen more than 1"):
        manager.load(tmp_path / "cache")


@pytest.mark.parametrize("name", ["num_layers", "kv_heads"])
def test_a_small_file_cannot_claim_a_large_cache(tmp_path, name):
    """Refused before anything of that size is made: it would be 10^8 configs or heads."""
    _, state = make()
    path = tmp_path / "cache"
    state.save(path)

    def claim(header):
        claimed = {"policy": [lc.H2O().to_dict()], "query_heads": 10**8, name: 10**8}
        header.update(config=json.dumps({**json.loads(header["config"]), **claimed}))

    rewritten(path, change_header=claim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{name} = 100000000"):
        lc.CacheState.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_fewer_layers_than_claimed_are_refused(tmp_path):
    _, state = make()
    path = tmp_path / "cache"
    state.save(path)
    rewritten(
        path, lambda tensors: [tensors.pop(n) for n in [*tensors] if n.startswith("layers.1.")]
    )
    with pytest.raises(ValueError, match="num_layers = 2, but found tensors of 1"):
        lc.CacheState.load(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    for place in draws.integers(8, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draws.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="cache"):
            manager.load(path)


HEADERS = {
    "deep-config": lambda header: header.update(config="[" * 200_000),
    "deep-capacity": lambda header: header.update(
        config=header["config"].replace(
            '"capacity": 6', '"capacity": [6, ' + "[" * 900 + "]" * 900 + "]"
        )
    ),
    "deep-bounds": lambda header: header.update(tokens_bound="[" * 200_000),
    "no-config": lambda header: header.pop("config"),
    "config-of-another-format": lambda header: header.update(
        config=json.dumps({**json.loads(header["config"]), "format": 99})
    ),
    "config-with-another-field": lambda header: header.update(
        config=json.dumps({**json.loads(header["config"]), "extra": 1})
    ),
    "config-that-is-no-json": lambda header: header.update(config="{"),
    "too-few-bounds": lambda header: header.update(tokens_bound="[3]"),
}


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_damaged_headers_are_refused(tmp_path, damage):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    rewritten(path, change_header=damage)
    with pytest.raises(
        ValueError,
        match=r"lacks|field|format|Expecting|unexpected|tokens_bound|deep|recursion|entries",
    ):
        manager.load(path)


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    manager, state = make()
    path = tmp_path / "cache"
    state.save(path)
    old = path.read_bytes()
    append(manager, state, 1, seed=3)

    def interrupted(tensors, name, metadata):
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(_tensor_files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_snapshot_replaces_an_older_one_and_makes_its_folder(tmp_path):
    manager, state = make()
    path = tmp_path / "a" / "b" / "cache"
    state.save(path)
    append(manager, state, 1, seed=3)
    state.save(path)
    assert bits_of(manager.load(path)) == bits_of(state)
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o400


def test_a_snapshot_takes_what_the_state_takes(tmp_path):
    _, state = make()
    state.save(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < state.nbytes + 8192
