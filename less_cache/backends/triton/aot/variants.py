"""The kernel variants that the compile gate covers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch

from ....arrays import MAX_SHORT_TOKENS
from ....config import CacheConfig
from ....policies import (
    H2O,
    TOVA,
    DecayedH2O,
    FullCache,
    Gain,
    KeyNorm,
    ObservationWindow,
    Policy,
    Scissorhands,
    SinkWindow,
)
from ....quantization import BITS, TRANSFORMS, Quantization
from ...torch.slots import open_run
from ..chunk import attention
from ..scan import LARGEST_CAPACITY, eviction_times
from .on_meta import meta_maps, meta_shift, meta_step, meta_tokens

HIDDEN = 512
CHUNK = 1024
POLICIES: tuple[Policy, ...] = (
    H2O(),
    SinkWindow(),
    Scissorhands(),
    KeyNorm(recent=1),
    TOVA(),
    DecayedH2O(factor=0.97),
    ObservationWindow(),
    FullCache(),
)


@dataclass(frozen=True)
class Variant:
    """A cache and a batch, which determine the kernels of a call."""

    head_dim: int = 128
    dtype: str = "float16"
    group: int = 1
    rank: int = 8
    kind: str = "exp"
    policy: Policy = H2O()  # noqa: RUF009 - frozen
    capacity: int | tuple[int, ...] = 205
    kv_heads: int = 32
    batch: int = 64
    softcap: float | None = None
    masked: bool = False
    pooled: bool = False
    codes: Quantization | None = None

    def __str__(self) -> str:
        policy = type(self.policy).__name__
        text = (
            f"{policy} C={self.capacity} D={self.head_dim} R={self.rank} {self.kind} G={self.group}"
            f" {self.dtype} B={self.batch} Hkv={self.kv_heads}"
        )
        text += f" softcap={self.softcap:g}" if self.softcap else ""
        text += " masked" if self.masked else ""
        text += " pooled" if self.pooled else ""
        if self.codes is None:
            return text
        return f"{text} {self.codes.transform} {self.codes.key_bits}, {self.codes.value_bits} bits"

    @property
    def config(self) -> CacheConfig:
        """A config whose steps launch this kernel."""
        return CacheConfig(
            num_layers=1,
            query_heads=self.group * self.kv_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            capacity=self.capacity if isinstance(self.capacity, int) else [self.capacity],
            policy=self.policy,
            rank=self.rank,
            softcap=self.softcap,
            dtype=self.dtype,
            quantization=self.codes,
            # Coded slots have positions of 16 bits then.
            max_positions=MAX_SHORT_TOKENS,
        )


def launches_of(variant: Variant) -> None:
    """Make the variant's calls on tensors without data; use it within `launch.recording`.

    A decode step, the attention of a chunk of `CHUNK` tokens, and the scan of as many.
    """
    layer = variant.config.layer(0)
    maps = meta_maps(layer, variant.kind if variant.rank else None, HIDDEN)
    arrays = meta_step(layer, variant.batch, maps, masked=variant.masked, pooled=variant.pooled)
    lengths = torch.empty(variant.batch, dtype=torch.int32, device="meta")
    weight = None
    if layer.policy.gains is Gain.SUM:
        weight = torch.empty(variant.batch, CHUNK, device="meta")
    for run in layer.runs:
        columns = run.layer.capacity + CHUNK
        keys = meta_tokens(layer, variant.batch, run.heads, columns)
        kind = getattr(torch, layer.position_dtype)
        positions = torch.empty(keys.shape[:3], dtype=kind, device="meta")
        q = meta_tokens(layer, variant.batch, run.layer.query_heads, CHUNK)
        own = None if maps is None else maps.heads(run.query_heads, run.kv_heads)
        held = open_run(run, arrays, None, None)
        shift = meta_shift(run.layer, variant.batch, CHUNK)
        attention(lengths, run.layer, held, own, q, keys, keys, positions, weight, shift)
    if max(layer.capacities) <= LARGEST_CAPACITY and layer.policy.evicts:
        q = meta_tokens(layer, variant.batch, layer.query_heads, CHUNK)
        k = meta_tokens(layer, variant.batch, layer.kv_heads, CHUNK)
        mask = torch.ones(variant.batch, CHUNK, dtype=torch.bool, device="meta")
        eviction_times(layer, q, k, mask if variant.masked else None)


def selected_variants() -> list[Variant]:
    """A selection that has each head size, type, policy, kind and rank at least once."""
    usual = Variant()
    return [
        usual,
        replace(usual, policy=SinkWindow(), group=4, kv_heads=8, dtype="bfloat16"),
        replace(usual, policy=Scissorhands(), head_dim=64, kind="paper", rank=16),
        replace(usual, policy=KeyNorm(recent=1), head_dim=80, dtype="bfloat16", masked=True),
        replace(usual, policy=TOVA(), head_dim=96, group=8, kv_heads=4, rank=64, kind="paper"),
        replace(usual, policy=FullCache(), rank=0, capacity=4096, batch=1),
        replace(usual, batch=1, capacity=8192, group=4, kv_heads=8, rank=4),
        replace(usual, head_dim=256, softcap=50.0, group=2, kv_heads=8),
        replace(usual, dtype="float32", capacity=100),
        replace(
            usual, kv_heads=4, group=4, capacity=(40, 205, 205, 1000), masked=True, pooled=True
        ),
        replace(usual, kv_heads=2, batch=1, capacity=(300, 6000), policy=Scissorhands()),
        replace(usual, codes=Quantization(3, 3)),
        replace(
            usual,
            codes=Quantization(4, 4, "calibrated"),
            dtype="bfloat16",
            group=8,
            kv_heads=4,
            head_dim=96,
            pooled=True,
        ),
        replace(
            usual, codes=Quantization(8, 2), dtype="float32", head_dim=64, batch=1, capacity=4000
        ),
    ]


def few_variants() -> list[Variant]:
    """The usual one, split over programs and coded: each kernel at least once."""
    return [Variant(), Variant(batch=1, capacity=8192), Variant(codes=Quantization(3, 3))]


def coded_variants() -> list[Variant]:
    """Each number of bits with both bases, and each size with 3 bits."""
    usual = Variant(codes=Quantization())
    variants = [
        replace(usual, codes=Quantization(bits, bits, transform), batch=batch)
        for bits, transform, batch in itertools.product(BITS, TRANSFORMS, (1, 64))
    ]
    for transform, head_dim, dtype in itertools.product(
        TRANSFORMS, (64, 80, 96, 128, 256), ("float16", "float32")
    ):
        coded = replace(usual, codes=Quantization(3, 3, transform))
        variants.append(replace(coded, head_dim=head_dim, dtype=dtype))
    variants += [replace(usual, group=group, kv_heads=8) for group in (4, 8, 16)]
    variants += [replace(usual, policy=policy, rank=0) for policy in POLICIES]
    variants += [
        replace(usual, group=71, kv_heads=1, head_dim=64),
        replace(usual, group=32, kv_heads=2, codes=Quantization(4, 4, "calibrated")),
    ]
    return variants


def every_variant() -> list[Variant]:
    """Each axis (policy, head size, dtype, group, rank, ...) crossed with the usual variant."""
    variants = [*selected_variants(), *coded_variants()]
    for policy, head_dim, dtype in itertools.product(
        POLICIES, (64, 80, 96, 128, 256), ("float16", "bfloat16", "float32")
    ):
        variants.append(Variant(policy=policy, head_dim=head_dim, dtype=dtype))
    for rank, kind, group in itertools.product((0, 4, 8, 16, 32, 64), ("paper", "exp"), (1, 4, 8)):
        variants.append(Variant(rank=rank, kind=kind, group=group, kv_heads=32 // group))
    for capacity, batch in itertools.product((16, 100, 819, 2048, 8192), (1, 16)):
        variants.append(Variant(capacity=capacity, batch=batch, kv_heads=8, group=4))
    variants += [
        Variant(group=16, kv_heads=2),
        Variant(group=71, kv_heads=1, head_dim=64),
        Variant(dtype="bfloat16", masked=True),
        Variant(softcap=30.0, policy=Scissorhands(window=62)),
        Variant(pooled=True),
        Variant(pooled=True, kv_heads=2, capacity=(64, 4000), dtype="bfloat16"),
        Variant(pooled=True, kv_heads=2, capacity=(64, 4000), dtype="float32", group=4),
    ]
    return list(dict.fromkeys(variants))
