# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: RET505 (Triton compiles these forms, and not their short ones)
"""Functions that several kernels call."""

import triton
import triton.language as tl

from ..launch import INTERPRETED

EXPONENT_LIMIT: tl.constexpr = tl.constexpr(30.0)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
LAST_POSITION: tl.constexpr = tl.constexpr(2**31 - 1)

# The values of `policies.Start` and `policies.Gain`, `policies.FAIR_SHARE`, and the kinds of
# feature maps, as kernels know them.
START_ZERO: tl.constexpr = tl.constexpr(0)
START_POSITION: tl.constexpr = tl.constexpr(1)
START_KEY_NORM: tl.constexpr = tl.constexpr(2)
GAIN_NONE: tl.constexpr = tl.constexpr(0)
GAIN_SUM: tl.constexpr = tl.constexpr(1)
GAIN_HISTORY: tl.constexpr = tl.constexpr(2)
FAIR_SHARE: tl.constexpr = tl.constexpr(1.0 - 1e-6)
NO_MAPS: tl.constexpr = tl.constexpr(0)
PAPER: tl.constexpr = tl.constexpr(1)
EXP: tl.constexpr = tl.constexpr(2)


if INTERPRETED:

    def bound(number):
        """A loop's bound as the interpreter's ``range`` wants it."""
        return int(number.handle.data.item())

else:

    @triton.jit
    def bound(number):
        """A loop's bound: the number itself."""
        return number


@triton.jit
def gelu(x):
    """Gelu: x Φ(x) = x (1 + erf(x / √2)) / 2."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def capped(x, SOFTCAP: tl.constexpr):
    """Soft cap c tanh(x / c), x where c = 0; tanh y = sign(y) (1 - e) / (1 + e), e = exp(-2|y|)."""
    if SOFTCAP > 0:
        e = tl.exp(-2.0 / SOFTCAP * tl.abs(x))
        t = SOFTCAP * (1.0 - e) / (1.0 + e)
        return tl.where(x < 0, -t, t)
    else:
        return x


@triton.jit
def gathered(s, value, peak, mass, numerator, DOT: tl.constexpr):
    """Sums m, Σ exp(s - m), Σ exp(s - m) v, continued with logits s [M, N] and values [N, D].

    A row that has seen nothing yet has m = -∞, and sums of 0.
    """
    top = tl.maximum(peak, tl.max(s, 1))
    finite = tl.where(top == -INFINITY, 0.0, top)
    weights = tl.exp(s - finite[:, None])
    fade = tl.exp(peak - finite)
    mass = mass * fade + tl.sum(weights, 1)
    numerator = numerator * fade[:, None]
    numerator += tl.dot(weights.to(DOT), value, input_precision="ieee")
    return top, mass, numerator


@triton.jit
def initial_score(seen, key, START: tl.constexpr):
    """The score that the pair at position `seen` starts with; `key` [BLOCK_D] float32."""
    if START == START_POSITION:
        return seen.to(tl.float32)
    elif START == START_KEY_NORM:
        return -tl.sqrt(tl.sum(key * key, 0))
    else:
        return 0.0


@triton.jit
def popcount(bits):
    """How many bits of each non-negative int64 are set."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    return (bits + (bits >> 32)) & 0x7F


@triton.jit
def two_layers(
    x,
    w1,
    b1,
    w2,
    HEAD_DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
):
    """Products gelu(x W1 + b1) W2 for x [BLOCK_B, BLOCK_D], W1 [D, hidden], W2 [hidden, R].

    The hidden numbers are formed BLOCK_H at a time and never stored. Both products are formed
    transposed: sequences are few, and each warp would repeat what has as few rows as they are.
    """
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    x = tl.trans(x.to(DOT))
    features = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        real = hidden < HIDDEN
        first = tl.load(
            w1 + d[:, None] * HIDDEN + hidden[None, :],
            mask=(d[:, None] < HEAD_DIM) & real[None, :],
            other=0.0,
        ).to(DOT)
        second = tl.load(
            w2 + hidden[:, None] * RANK + r[None, :],
            mask=real[:, None] & (r[None, :] < RANK),
            other=0.0,
        ).to(DOT)
        before = tl.dot(tl.trans(first), x, input_precision="ieee")
        if b1 is not None:
            before += tl.load(b1 + hidden, mask=real, other=0.0).to(tl.float32)[:, None]
        activated = gelu(before).to(DOT)
        features += tl.dot(tl.trans(second), activated, input_precision="ieee")
    return tl.trans(features)


@triton.jit
def last_of_phi(features, KIND: tl.constexpr):
    """φ from what its two layers give: |gelu(f)|, or exp(clamp(f, ±30)) of the kind "exp"."""
    if KIND == EXP:
        return tl.exp(tl.minimum(tl.maximum(features, -EXPONENT_LIMIT), EXPONENT_LIMIT))
    else:
        return tl.abs(gelu(features))


@triton.jit
def last_of_psi(
    features,
    w3,
    s1,
    s2,
    b,
    head,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """ψ from its two layers: |u + (u W3) s2|, u = |s1| gelu(f), or exp(clamp(f + b, ±30)).

    The parameters of all heads are given, those of the other kind being None.
    """
    r = tl.arange(0, BLOCK_R)
    real = r < RANK
    own = head * RANK + r
    if KIND == EXP:
        exponent = features + tl.load(b + own, mask=real, other=0.0)[None, :]
        return tl.exp(tl.minimum(tl.maximum(exponent, -EXPONENT_LIMIT), EXPONENT_LIMIT))
    else:
        u = tl.abs(tl.load(s1 + own, mask=real, other=0.0))[None, :] * gelu(features)
        third = tl.load(
            w3 + own[:, None] * RANK + r[None, :], mask=real[:, None] & real[None, :], other=0.0
        )
        # Plain products in float32 keep both factors in registers, more than there are; three of
        # TF32 are exact to all but the last bits.
        mixed = tl.dot(u, third.to(tl.float32), input_precision="tf32x3")
        return tl.abs(u + mixed * tl.load(s2 + own, mask=real, other=0.0)[None, :])
