"""Coded slots in a decode step: splits, pools full of anything, guards, scans, narrow numbers."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.arrays import empty_arrays
from less_cache.backends.triton import decode, tiles
from less_cache.backends.triton.kernels.planes import Assembly, codes_text, read_text
from less_cache.quantization import code_layout
from less_cache.quantization.codes import unpack
from less_cache.quantization.layout import PROFILES
from less_cache.teacher_forced import eviction_times
from tests.backends.triton import ptx
from tests.backends.triton.guards import Guards
from tests.backends.triton.oracle import DEVICE
from tests.helpers import random_maps
from tests.quantization.fitted import fitted, some_tokens


def coded(policy, bits=(3, 4), kind="hadamard", **changes):
    parameters = {
        "num_layers": 1,
        "query_heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "capacity": 6,
        "policy": policy,
        "rank": 2,
        "quantization": lc.Quantization(*bits, kind),
    }
    return lc.CacheConfig(**{**parameters, **changes})


def plans(config):
    """The layer's plan on Triton and on torch."""
    maps = random_maps(config)
    basis = fitted(config)[0] if config.quantization.transform == "calibrated" else None
    layer = config.layer(0)
    return [
        lc.plan_step(layer, None if maps is None else maps[0], basis, device=DEVICE, backend=name)
        for name in ("triton", "torch")
    ]


def check_steps(config, monkeypatch, *, batch=2, first=1, steps=5, bound=2e-5):
    """Steps in rows of a pool of poison, beside the same on torch; buffers are guarded."""
    triton, torch_plan = plans(config)
    layer, dtype = config.layer(0), getattr(torch, config.dtype)
    guards = Guards()
    rows = torch.tensor([3, 1][:batch], device=DEVICE)
    pool, other = empty_arrays(layer, 4, device=DEVICE), empty_arrays(layer, 4, device=DEVICE)
    for array in pool.named().values():
        # A row of length 0 counts as empty whatever bytes it holds.
        array.fill_(float("nan") if array.is_floating_point() else 77)
    pool = guards.arrays(pool)
    lengths = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    with monkeypatch.context() as patched:
        for index in range(steps):
            tokens = [
                x.to(DEVICE, dtype)
                for x in some_tokens(config, batch, 1 if index else first, seed=index)
            ]
            mask = None
            if index == 2:
                mask = torch.tensor([[False], [True]][:batch], device=DEVICE)
            given = {"lengths": lengths, "rows": rows, "mask": mask}
            wanted = lc.step(torch_plan, other, *tokens, **given)
            if index:
                patched.setattr(torch, "empty", guards.empty)
            found = lc.step(triton, pool, *tokens, **given)
            patched.undo()
            torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
            lengths += tokens[1].shape[2] if mask is None else mask.sum(1)
    guards.check()
    for name, array in pool.named().items():
        expected, own = other.named()[name][rows], array[rows]
        if name in ("keys", "values", "key_scales", "value_scales"):
            order = [a.positions[rows].argsort(1) for a in (pool, other)]
            index = [i if own.ndim == 2 else i.unsqueeze(2).expand_as(own) for i in order]
            held = other.positions[rows].gather(1, order[1]) >= 0
            own, expected = own.gather(1, index[0])[held], expected.gather(1, index[1])[held]
            assert torch.equal(own, expected), name
        elif name in ("H", "z"):
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    assert bool((pool.keys[0] == 77).all()), "a row that nobody named"


POLICIES = (
    lc.FullCache(),
    lc.H2O(),
    lc.Scissorhands(window=5),
    lc.KeyNorm(recent=2),
    lc.ObservationWindow(window=3),
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_steps_over_any_bytes_are_those_of_torch(policy, monkeypatch):
    check_steps(coded(policy, capacity=9 if not policy.evicts else 4), monkeypatch)


@pytest.mark.parametrize(
    ("kind", "bits", "head_dim"), [("hadamard", (3, 2), 20), ("calibrated", (4, 2), 16)]
)
def test_shared_slots(kind, bits, head_dim, monkeypatch):
    # 16 slots a tile; of three programs the last has none.
    monkeypatch.setattr(tiles, "CODED_TILE_BYTES", {4: 16 * 4 * head_dim})
    shared = functools.partial(tiles.tiles, splits=3)
    monkeypatch.setattr(decode, "tiles", lambda *args, aligned: shared(*args[:3], aligned=aligned))
    config = coded(lc.H2O(), bits, kind, head_dim=head_dim, capacity=70)
    check_steps(config, monkeypatch, batch=1, first=69, steps=3)


@pytest.mark.parametrize("compiler", [True, False])
def test_who_loads_codes_ahead_changes_nothing(compiler, monkeypatch):
    # Five tiles of 16 slots, the last of them not full.
    monkeypatch.setattr(tiles, "CODED_TILE_BYTES", {4: 16 * 4 * 16})
    monkeypatch.setattr(tiles, "asynchronous", lambda *_: compiler)
    check_steps(coded(lc.H2O(), capacity=70), monkeypatch, batch=1, first=68, steps=4)


def test_small_or_crooked_tiles_are_loaded_ahead():
    def ahead(bits=(3, 3), kind="hadamard", aligned=True, **changes):
        given = {"head_dim": 128, "dtype": "float16", "capacity": 500, **changes}
        layer = coded(lc.H2O(), bits, kind, **given).layer(0)
        tile = tiles.tiles(layer, 64, 132, aligned=aligned)
        return tile.ahead, tile.slots

    assert ahead() == (False, 64)
    assert ahead((4, 4), "calibrated") == (False, 64)
    # 20 bytes of low bits, and then 10.
    assert ahead(head_dim=80) == (True, 32)
    assert ahead(aligned=False) == (True, 32)
    # 512 bytes for 256 threads.
    assert ahead(dtype="float32") == (True, 16)
    plain = coded(lc.H2O(), head_dim=80, quantization=None, dtype="float16").layer(0)
    assert not tiles.tiles(plain, 64, 132, aligned=False).ahead


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
def test_victims_chosen_in_a_launch_of_their_own(kind, monkeypatch):
    monkeypatch.setattr("less_cache.backends.triton.plans.MOST_SCANNED", 0)
    check_steps(coded(lc.H2O(), kind=kind, capacity=4), monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "kind", "bits", "bound"),
    [("float16", "hadamard", (3, 4), 0.01), ("bfloat16", "calibrated", (4, 8), 0.06)],
)
def test_narrow_models(dtype, kind, bits, bound, monkeypatch):
    config = coded(lc.SinkWindow(1), bits, kind, dtype=dtype, capacity=4, head_dim=64, rank=0)
    check_steps(config, monkeypatch, bound=bound)


@pytest.mark.parametrize("policy", [lc.H2O(), lc.KeyNorm(recent=2)], ids=str)
@pytest.mark.parametrize("prompt", [1, 7])
def test_scans_say_what_steps_say(policy, prompt):
    config = coded(policy, (2, 2), capacity=[[5, 7]], kv_heads=2)
    q, k, _ = (x.float().to(DEVICE) for x in some_tokens(config, 1, 14))
    mask = torch.ones(1, 14, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = False
    found, wanted = (
        eviction_times(config.layer(0), q, k, mask, prompt=prompt, backend=name)
        for name in ("triton", "torch")
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("head_dim", [1, 16, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kind", "bits"), PROFILES)
def test_a_text_says_all_of_a_layout(kind, bits, head_dim):
    layout = code_layout(kind, bits, head_dim)
    planes = []
    for part in read_text(codes_text(layout)):
        low = (part.first, part.channels, part.low_width, 0, part.low_offset, part.low_bytes)
        planes.append(low)
        if part.high_width:
            high = (part.first, part.channels, part.high_width, part.low_width)
            planes.append((*high, part.high_offset, part.high_bytes))
        # What kernels ask of sizes: powers of two, long enough for a product.
        assert part.places >= 16
        assert part.places & (part.places - 1) == 0
        assert part.padded_bytes >= part.low_bytes
    assert tuple(planes) == tuple(dataclasses.astuple(plane) for plane in layout.planes)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("kind", "bits"), PROFILES)
def test_the_assembly_unpacks_what_was_packed(kind, bits, head_dim):
    # The interpreter takes another way: what a GPU would run is carried out here.
    layout = code_layout(kind, bits, head_dim)
    pair = np.random.default_rng(0).integers(0, 256, layout.nbytes, dtype=np.uint8)
    wanted = unpack(layout, pair)
    for part in read_text(codes_text(layout)):
        assert part.halved
        asm = Assembly(part)
        found = np.zeros((part.fields, part.low_bytes), np.float16)
        for first in range(0, part.low_bytes, 4):
            # The last four of a run may reach beyond it, where a kernel reads zeros.
            byte = np.arange(first, min(first + 4, part.low_bytes))
            taken = [word(pair[part.low_offset + byte])]
            if part.high_width:
                second = np.where(byte < part.high_bytes, 0, 255)
                highs = pair[part.high_offset + byte % part.high_bytes]
                taken += [word(highs), word(second)]
            halves = np.array(ptx.run(asm.text, asm.constraints, taken), np.uint32)
            fields = halves.view(np.float16).reshape(part.fields, 4)
            found[:, byte] = fields[:, : len(byte)]
        units = 2.0 ** -(np.arange(part.fields) * part.low_width)
        codes = (found * units[:, None]).reshape(-1)[: part.channels]
        np.testing.assert_array_equal(codes, wanted[part.first : part.first + part.channels])


def word(four) -> int:
    return int.from_bytes(bytes(int(byte) for byte in four), "little")
