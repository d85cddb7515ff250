"""A prompt's attention and its sums against a plain softmax in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from less_cache.backends.torch import prompt
from less_cache.backends.torch.prompt import Past, add_low_rank, causal_attention

SCALE = 0.3
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""Of outputs; log-masses and sums are float32 for 16-bit inputs."""


def tensors(query_heads, kv_heads, tokens, *, batch=2, head_dim=16, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, head_dim) for heads in (query_heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def some_past(kv_heads, slots, *, batch=2, head_dim=16, dtype=torch.float32, seed=1):
    """Heads that hold all slots, none, and some."""
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads, slots, head_dim)
    keys, values = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    share = torch.tensor([1.0, 0.0, 0.5]).repeat(batch * kv_heads)[: batch * kv_heads]
    held = torch.rand(shape[:3], generator=draw) < share.view(batch, kv_heads, 1)
    return Past(keys, values, held)


def plain(q, k, v, *, scale=SCALE, softcap=None, past=None, weight=None):
    """What `causal_attention` gives, in float64 and with all probabilities at once."""
    batch, query_heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, kv_heads, -1, -1)
    kept = 0
    if past is not None:
        kept = past.held.shape[2]
        k, v = torch.cat([past.keys, k], 2), torch.cat([past.values, v], 2)
        held = past.held.unsqueeze(2).expand(-1, -1, tokens, -1)
        visible = torch.cat([held, visible], 3)
    group = query_heads // kv_heads
    k, v, visible = (array.repeat_interleave(group, 1) for array in (k, v, visible))
    logits = q.double() @ k.double().transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    share = logits.softmax(3)
    counts = torch.zeros(tokens) if weight is None else weight
    gained = torch.einsum("bhij,bi->bhj", share, counts.double().expand(batch, tokens))
    gained = gained.view(batch, kv_heads, group, -1).sum(2)
    past_sums = None if past is None else gained[..., :kept]
    return share @ v.double(), logits.logsumexp(3), gained[..., kept:], past_sums


def agrees(q, k, v, *, log_mass_near=0.0, **options):
    found = causal_attention(q, k, v, **{"scale": SCALE, **options})
    wanted = plain(q, k, v, **options)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert found.mean.dtype == q.dtype
    assert found.log_mass.dtype == found.gained_new.dtype == exact
    near = TOLERANCE[q.dtype]
    torch.testing.assert_close(found.mean.double(), wanted[0], rtol=near, atol=near)
    close = {"rtol": 10 * TOLERANCE[exact], "atol": 10 * TOLERANCE[exact]}
    near = max(log_mass_near, close["rtol"])
    torch.testing.assert_close(found.log_mass.double(), wanted[1], rtol=near, atol=near)
    torch.testing.assert_close(found.gained_new.double(), wanted[2], **close)
    if options.get("past") is None:
        assert found.gained_past is None
    else:
        torch.testing.assert_close(found.gained_past.double(), wanted[3], **close)


def weights(kind, tokens):
    age = torch.arange(tokens - 1, -1, -1.0)
    return {
        "none": None,
        "all": torch.ones(tokens),
        "decay": 0.97**age,
        "last 32": (age < 32).float(),
        "last": (age < 1).float(),
        "zero": torch.zeros(tokens),
    }[kind]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (5, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("slots", [0, 37])
def test_dtypes_groups_softcap_and_past(dtype, heads, softcap, slots):
    q, k, v = tensors(*heads, 301, dtype=dtype)
    past = some_past(heads[1], slots, dtype=dtype) if slots else None
    agrees(q, k, v, softcap=softcap, past=past, weight=torch.ones(301))


@pytest.mark.parametrize("kind", ["none", "all", "decay", "last 32", "last", "zero"])
@pytest.mark.parametrize("tokens", [1, 2, 31, 130, 700])
@pytest.mark.parametrize("slots", [0, 5])
def test_weights_and_lengths(kind, tokens, slots):
    q, k, v = tensors(4, 2, tokens)
    past = some_past(2, slots) if slots else None
    agrees(q, k, v, past=past, weight=weights(kind, tokens))


@pytest.mark.parametrize("kind", ["none", "last 32", "last"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_prompts_whose_first_queries_count_for_nothing(kind, dtype, monkeypatch):
    calls = []
    flash = prompt._flash
    monkeypatch.setattr(prompt, "_flash", lambda *given: calls.append(1) or flash(*given))
    tokens = prompt.FLASH_FROM + 33
    q, k, v = tensors(2, 2, tokens, dtype=dtype, batch=1)
    # PyTorch sums rounded exponentials in bfloat16.
    rounded = 4e-4 if dtype == torch.bfloat16 else 0.0
    agrees(q, k, v, weight=weights(kind, tokens), log_mass_near=rounded)
    assert len(calls) == (dtype != torch.float16)


@pytest.mark.parametrize("kind", ["none", "all"])
def test_strides(kind):
    tokens = prompt.FLASH_FROM + 5
    straight = tensors(2, 2, tokens)
    expected = causal_attention(*straight, scale=SCALE, weight=weights(kind, tokens))
    for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        inverse = sorted(range(4), key=order.__getitem__)
        strided = [array.permute(order).contiguous().permute(inverse) for array in straight]
        found = causal_attention(*strided, scale=SCALE, weight=weights(kind, tokens))
        for one, other in zip(found[:3], expected[:3], strict=True):
            torch.testing.assert_close(one, other)


def test_each_row_has_weights_of_its_own():
    q, k, v = tensors(4, 2, 90)
    weight = torch.zeros(2, 90)
    weight[0, 80:], weight[1, 40] = 1.0, 2.5
    agrees(q, k, v, past=some_past(2, 9), weight=weight)


def test_empty_slots_gain_nothing_and_give_nothing():
    q, k, v = tensors(4, 2, 40)
    past = some_past(2, 6)._replace(held=torch.zeros(2, 2, 6, dtype=torch.bool))
    found = causal_attention(q, k, v, scale=SCALE, past=past, weight=torch.ones(40))
    alone = causal_attention(q, k, v, scale=SCALE, weight=torch.ones(40))
    assert not found.gained_past.any()
    for one, other in zip(found[:3], alone[:3], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [50, prompt.FLASH_FROM])
def test_huge_logits(dtype, tokens):
    q, k, v = tensors(2, 2, tokens, batch=1, dtype=dtype)
    # Unscaled, the products are beyond the largest float16.
    found = causal_attention(q * 500, k * 500, v, scale=1.0, weight=weights("last", tokens))
    assert all(array.isfinite().all() for array in found[:3])
    torch.testing.assert_close(found.gained_new.sum(2), torch.ones_like(found.log_mass[..., 0]))
    largest = v.abs().amax((2, 3), keepdim=True)
    assert (found.mean.abs() <= largest * 1.01).all()


def test_blocks_of_every_size_agree(monkeypatch):
    q, k, v = tensors(6, 3, 97)
    past, weight = some_past(3, 11), weights("decay", 97)
    for budget in (1, 5_000, 20_000, 2**20):
        monkeypatch.setattr(prompt, "BLOCK_LOGITS", budget)
        for rows in (1, 14, 256):
            monkeypatch.setattr(prompt, "BLOCK_ROWS", rows)
            agrees(q, k, v, past=past, weight=weight)


@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    tokens=st.integers(1, 150),
    head_dim=st.integers(1, 40),
    slots=st.integers(0, 40),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    kind=st.sampled_from(["none", "all", "decay", "last"]),
)
def test_shapes(batch, kv_heads, group, tokens, head_dim, slots, softcap, kind):
    shape = {"batch": batch, "head_dim": head_dim, "dtype": torch.float64}
    q, k, v = tensors(kv_heads * group, kv_heads, tokens, **shape)
    past = some_past(kv_heads, slots, **shape) if slots else None
    agrees(q, k, v, softcap=softcap, past=past, weight=weights(kind, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_low_rank_state(dtype):
    q, k, v = tensors(6, 2, 20, dtype=dtype)
    pairs = causal_attention(q, k, v, scale=SCALE)
    draw = torch.Generator().manual_seed(2)
    features = torch.rand(2, 6, 20, 5, generator=draw)
    H, z = torch.randn(2, 2, 5, 16, generator=draw), torch.rand(2, 2, 5, generator=draw)
    H[0, 0], z[0, 0] = 0, 0
    out = add_low_rank(pairs.mean, pairs.log_mass, features, H, z)
    wide_H, wide_z = (array.double().repeat_interleave(3, 1) for array in (H, z))
    mass = pairs.log_mass.double().exp().unsqueeze(3)
    whole = mass + features.double() @ wide_z.unsqueeze(3)
    wanted = (mass * pairs.mean.double() + features.double() @ wide_H) / whole
    assert out.dtype == pairs.log_mass.dtype
    torch.testing.assert_close(out.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out[0, :3], pairs.mean[0, :3].to(out.dtype))


@pytest.mark.parametrize("log_mass", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e13])
def test_low_rank_state_of_any_size(log_mass, size):
    """A state of one value repeated: the output lies between the pairs' mean and that value."""
    mean = torch.full((1, 2, 3, 4), -1.0)
    z = torch.full((1, 1, 2), size)
    out = add_low_rank(
        mean,
        torch.full((1, 2, 3), log_mass),
        torch.ones(1, 2, 3, 2),
        z.unsqueeze(3).repeat(1, 1, 1, 4) * 3,
        z,
    )
    pairs_share = 1.0
    if size:
        odds = torch.tensor(2 * size, dtype=torch.float64).log() - log_mass
        pairs_share = torch.sigmoid(-odds).item()
    torch.testing.assert_close(out, torch.full_like(out, 3 - 4 * pairs_share))
