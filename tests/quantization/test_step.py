"""The step over coded pairs: every backend as the reference, and teacher forcing as both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from less_cache.scoring import attend_from_empty, attend_one_by_one
from less_cache.teacher_forced import attend_all, eviction_times, stored_pairs
from tests.helpers import held_by, policy_id, random_maps
from tests.policies import Oldest
from tests.quantization.fitted import CODED, coded_config, fitted, some_tokens

KINDS = ("hadamard", "calibrated")


def manager(config, backend, seed=0):
    transforms = fitted(config, seed) if config.quantization.transform == "calibrated" else None
    return lc.CacheManager(config, random_maps(config), backend=backend, transforms=transforms)


def feed(run, config, state, chunks, *, numpy=False, seed=3, dtype=torch.float64):
    outs = []
    for index, size in enumerate(chunks):
        tokens = [x.to(dtype) for x in some_tokens(config, 2, size, seed + index)]
        draw = torch.Generator().manual_seed(index)
        mask = torch.rand(2, size, generator=draw) < 0.8
        arguments = [x.numpy() if numpy else x for x in (*tokens, mask)]
        outs.append(torch.as_tensor(run.attend(state, 0, *arguments)))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2)])
@pytest.mark.parametrize("policy", [*CODED, Oldest()], ids=policy_id)
def test_torch_does_as_the_reference(policy, bits, kind):
    config = coded_config(policy, bits, kind)
    reference, fast = manager(config, "reference"), manager(config, "torch")
    chunks = (5, 1, 1, 9, 1, 1, 1, 4, 1)
    states = reference.init(2, dtype=np.float64), fast.init(2)
    wanted = feed(reference, config, states[0], chunks, numpy=True)
    found = feed(fast, config, states[1], chunks)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    held = [held_by(state.layers[0], config.layer(0)) for state in states]
    for name in ("keys", "values", "positions"):
        np.testing.assert_array_equal(getattr(held[0], name), getattr(held[1], name))
    assert held[0].sums().keys() == held[1].sums().keys()
    for name, array in held[0].sums().items():
        np.testing.assert_allclose(array, held[1].sums()[name], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_dtypes_stay_close_to_the_reference(dtype, kind):
    config = coded_config(lc.SinkWindow(2), (4, 4), kind)
    reference, fast = manager(config, "reference"), manager(config, "torch")
    chunks = (5, 1, 1, 9, 1)
    narrow = [x.to(dtype).double() for x in some_tokens(config, 2, 17)]
    states = reference.init(2, dtype=np.float64), fast.init(2, dtype=dtype)
    start = 0
    for size in chunks:
        part = [x[:, :, start : start + size] for x in narrow]
        wanted = reference.attend(states[0], 0, *(x.numpy() for x in part))
        found = fast.attend(states[1], 0, *(x.to(dtype) for x in part))
        assert found.dtype == dtype
        # A code at a level's edge may fall to either side; the others agree.
        error = (found.double() - torch.from_numpy(wanted)).abs()
        assert error.median() <= 4 * torch.finfo(dtype).eps * np.abs(wanted).max()
        start += size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", CODED, ids=policy_id)
def test_teacher_forcing_says_what_decoding_says(policy, kind):
    config = coded_config(policy, kind=kind)
    run = manager(config, "torch")
    tokens = some_tokens(config, 2, 40)
    state = run.init(2)
    steps = [run.attend(state, 0, *(x[:, :, i : i + 1] for x in tokens)) for i in range(40)]
    spec = config.layer(0)
    basis = None if run.transforms is None else run.transforms[0]
    maps = run.maps.to(dtype=torch.float64)[0]
    times = eviction_times(spec, *tokens[:2], transforms=basis)
    stored = stored_pairs(spec, *tokens[1:], basis)
    found = attend_all(spec, maps, *tokens, times, stored=stored, block=7)
    torch.testing.assert_close(found, torch.cat(steps, 2), rtol=1e-5, atol=1e-5)


def test_a_pair_is_attended_exactly_in_its_own_step():
    config = coded_config(lc.FullCache(), (2, 2), rank=0)
    plain = config.replace(quantization=None)
    tokens = some_tokens(config, 1, 6)
    for backend in ("reference", "torch"):
        coded, exact = (lc.CacheManager(c, backend=backend) for c in (config, plain))
        first = [m.attend(m.init(1), 0, *tokens) for m in (coded, exact)]
        torch.testing.assert_close(first[0], first[1])
        state = coded.init(1)
        coded.attend(state, 0, *tokens)
        one = [x[:, :, :1] for x in some_tokens(config, 1, 1, seed=9)]
        # Alone with itself: a huge key outweighs whatever the slots hold.
        one[0] = one[1].repeat_interleave(2, 1) * 50
        out = coded.attend(state, 0, *one)
        torch.testing.assert_close(out, one[2].repeat_interleave(2, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_counted_to_the_byte(kind):
    config = coded_config(bits=(3, 4), kind=kind)
    state = manager(config, "torch").init(3)
    assert state.nbytes == 3 * config.bytes_per_sequence()
    # 16 channels: 6 and 8 bytes of codes, two scales, a float64 score and a position.
    assert config.layer(0).slot_bytes == 6 + 8 + 2 + 2 + 8 + 4
    assert config.with_dtype("float32").layer(0).slot_bytes == 6 + 8 + 2 + 2 + 4 + 4


@given(
    rows=st.permutations(range(5)),
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_rows_of_a_pool_are_as_a_batch_of_their_own(rows, kind, tokens, seed):
    config = coded_config(kind=kind)
    run = manager(config, "torch")
    layer = config.layer(0)
    basis = None if run.transforms is None else run.transforms[0]
    plan = lc.plan_step(layer, run.maps[0], basis)
    pool = lc.empty_arrays(layer, 5)
    draw = torch.Generator().manual_seed(seed)
    for array in pool.named().values():
        # A row of length 0 counts as empty whatever bytes it holds.
        noise = torch.randint(0, 256, (array.nbytes,), dtype=torch.uint8, generator=draw)
        array.copy_(noise.view(array.dtype).view(array.shape))
    state = run.init(2)
    chosen, lengths = torch.tensor(rows[:2]), torch.zeros(2, dtype=torch.int64)
    for index in range(3):
        new = some_tokens(config, 2, tokens, seed + index)
        wanted = run.attend(state, 0, *new)
        found = lc.step(plan, pool, *new, lengths=lengths, rows=chosen)
        torch.testing.assert_close(found, wanted)
        lengths += tokens


def test_packed_sequences_pages_and_compiled_steps_take_codes():
    config = coded_config(dtype="float32")
    layer = config.layer(0)
    plan = lc.plan_step(layer, random_maps(config)[0])
    page = config.page(0)
    arrays = page.arrays(torch.zeros(4, page.nbytes, dtype=torch.uint8))
    q, k, v = (x.float() for x in some_tokens(config, 1, 12))
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    first = torch.tensor([0, 5, 12])
    lengths = torch.zeros(2, dtype=torch.int64)
    found = lc.step(plan, arrays, *packed, lengths=lengths, query_start_loc=first)
    run = lc.CacheManager(config, random_maps(config), backend="torch")
    for start, stop in ((0, 5), (5, 12)):
        alone = run.attend(run.init(1), 0, *(x[:, :, start:stop] for x in (q, k, v)))
        torch.testing.assert_close(found[start:stop], alone[0].transpose(0, 1))

    state, other = run.init(1), run.init(1)
    compiled = torch.compile(run.attend, fullgraph=True, backend="eager")
    for index in range(12):
        one = [x[:, :, index : index + 1] for x in (q, k, v)]
        torch.testing.assert_close(compiled(state, 0, *one), run.attend(other, 0, *one))


@pytest.mark.parametrize("kind", KINDS)
def test_snapshots_and_beams_keep_codes(tmp_path, kind):
    config = coded_config(kind=kind)
    run = manager(config, "torch")
    state = run.init(2)
    feed(run, config, state, (9, 1, 1))
    state.save(tmp_path / "s.safetensors")
    read = run.load(tmp_path / "s.safetensors")
    one = some_tokens(config, 2, 1, seed=20)
    assert torch.equal(run.attend(read, 0, *one), run.attend(state, 0, *one))
    beams = state.select([1, 1, 0])
    state.reorder([1, 0])
    out = run.attend(beams, 0, *(x[[1, 1, 0]] for x in one))
    torch.testing.assert_close(run.attend(state, 0, *(x[[1, 0]] for x in one)), out[[0, 2]])


def test_a_snapshot_of_other_bases_is_refused(tmp_path):
    config = coded_config(kind="calibrated")
    run = manager(config, "torch")
    state = run.init(1)
    state.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="other transforms"):
        manager(config, "torch", seed=50).load(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="other transforms"):
        manager(config, "torch", seed=50).attend(state, 0, *some_tokens(config, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [0, 9])
def test_scoring_says_what_decoding_says_and_gives_gradients(kind, known):
    config = coded_config(kind=kind)
    run = manager(config, "torch")
    q, k, v = some_tokens(config, 2, 25)
    state = run.init(2)
    steps = [run.attend(state, 0, *(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(25)]
    wanted = torch.cat(steps, 2)[:, :, known:]
    scored = run.init(2)
    if known:
        attend_one_by_one(run, scored, 0, *(x[:, :, :known] for x in (q, k, v)))
    queries = q[:, :, known:].clone().requires_grad_()
    found = attend_one_by_one(run, scored, 0, queries, k[:, :, known:], v[:, :, known:])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert queries.grad.abs().max() > 0
    held = [x.layers[0].arrays() for x in (scored, state)]
    assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])
    if not known:
        basis = run.transforms_of(0)
        alone = attend_from_empty(config.layer(0), run.maps[0], q, k, v, transforms=basis)
        torch.testing.assert_close(alone, wanted, rtol=1e-5, atol=1e-5)
