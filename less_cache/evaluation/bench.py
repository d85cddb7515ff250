"""A decode step of a layer or a whole cache, on every backend that this machine can run."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn import functional as F

from .._checks import check_int, check_memory
from ..backends import BACKENDS, get_backend
from ..config import CacheConfig, Slots
from ..feature_maps import FeatureMaps
from ..manager import CacheManager
from ..policies import H2O, FullCache
from ..quantization import Quantization
from ..quantization.calibration import Moments, fit_layer
from ..quantization.transforms import Transforms
from ..state import CacheState
from .comparison import coded_name

WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Timing:
    """What one contestant's step took.

    Parameters
    ----------
    device, cache
        Where it ran, and which cache it was.
    milliseconds
        Median of a step.
    bytes_per_sequence
        What the cache takes.
    """

    device: str
    cache: str
    milliseconds: float
    bytes_per_sequence: int


def bench_layer(
    *,
    context: int,
    batch: int,
    query_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    capacity: Slots | Sequence[Slots] = 0.05,
    hidden: int = 512,
    quantization: Quantization | None = None,
) -> list[Timing]:
    """Time a decode step of one layer: the full cache, H2O alone, and LESS on each backend.

    Where codes are asked for, both once more with as many coded slots.

    The contestants take turns, so that a busy machine slows them alike; caches hold random pairs.

    Parameters
    ----------
    context
        Tokens that the full cache holds.
    batch
        Sequences.
    query_heads, kv_heads, head_dim
        The layer's shape; Llama 3 8B's by default.
    capacity
        Of the small caches: slots a head, a share of the context, or one for each KV head.
    hidden
        Hidden size of the maps.
    quantization
        Of the coded slots; ``None``: none are timed.

    Returns
    -------
    list of Timing
        For the CPU in float32; for a CUDA GPU, where there is one, in float16 as well.

    Raises
    ------
    ValueError, TypeError
        If a number is out of range, or the caches are larger than a device's memory.
    """
    check_int("batch", batch, minimum=1)
    check_int("context", context, minimum=1)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    timings = []
    for device in devices:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        full = CacheConfig(1, query_heads, kv_heads, head_dim, context, FullCache(), rank=0)
        small = full.replace(
            capacity=capacity if isinstance(capacity, (int, float, str)) else [capacity],
            max_positions=context,
            policy=H2O(),
            rank=8,
            dtype=dtype,
        )
        if max(small.layer(0).capacities) > context:
            raise ValueError(
                f"capacity: got {small.capacity}, expected at most the context = {context}"
            )
        kinds = [small]
        if quantization is not None:
            kinds.append(small.replace(quantization=quantization))
        runs = [(kind, name) for kind in kinds for name in _backends(kind, device.type)]
        # Alone and with LESS.
        needed = full.bytes_per_sequence(dtype) + 2 * sum(
            kind.bytes_per_sequence() for kind, _ in runs
        )
        given = f"{context}, {batch}, {query_heads}, {kv_heads}, {head_dim}"
        weights = (query_heads + kv_heads) * hidden * (head_dim + small.layer(0).rank) * 4
        check_memory(
            "context, batch, query_heads, kv_heads, head_dim",
            given,
            batch * needed + weights,
            device,
        )
        maps = FeatureMaps.initialise(small, hidden=hidden)
        shape = (batch, kv_heads, 1, head_dim)
        q = torch.randn(batch, query_heads, 1, head_dim, device=device, dtype=dtype)
        k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        keys, values = (
            torch.randn(batch, kv_heads, context, head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )

        def attend_over_everything(
            q: torch.Tensor = q, keys: torch.Tensor = keys, values: torch.Tensor = values
        ) -> object:
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

        contestants: list[tuple[str, int, Callable[[], object]]] = [
            ("full cache", 2 * keys[0].nbytes, attend_over_everything)
        ]
        for kind, name in runs:
            transforms = _some_transforms(kind)
            codes = "" if kind.quantization is None else f", {coded_name(kind.quantization)}"
            for config, used in ((kind.replace(rank=0), None), (kind, maps)):
                manager = CacheManager(config, used, backend=name, transforms=transforms)
                state = manager.init(batch, device=device)
                _fill(state, context)
                label = f"{'LESS' if used else 'H2O alone'}{codes} ({name})"

                def step(
                    manager: CacheManager = manager,
                    state: CacheState = state,
                    q: torch.Tensor = q,
                    k: torch.Tensor = k,
                    v: torch.Tensor = v,
                ) -> object:
                    return manager.attend(state, 0, q, k, v)

                contestants.append((label, config.bytes_per_sequence(), step))
        times = _take_turns([step for _, _, step in contestants], device)
        timings += [
            Timing(str(device), label, milliseconds, used)
            for (label, used, _), milliseconds in zip(contestants, times, strict=True)
        ]
    return timings


def bench_cache(
    config: CacheConfig,
    maps: FeatureMaps | None = None,
    transforms: Transforms | None = None,
    *,
    context: int,
    batch: int,
) -> list[Timing]:
    """Time a decode step of all of a model's layers with a given cache, on each backend.

    Each layer is timed by itself, beside a full cache's attention over as many heads, and the
    medians are added; layers of one shape are timed once. Caches hold random pairs.

    Parameters
    ----------
    config, maps, transforms
        Of the cache, as of `CacheManager`.
    context, batch
        As of `bench_layer`.

    Returns
    -------
    list of Timing
        As of `bench_layer`.

    Raises
    ------
    ValueError, TypeError
        As of `bench_layer`.
    """
    check_int("batch", batch, minimum=1)
    check_int("context", context, minimum=1)
    most = max(slots for layer in config.capacities for slots in layer)
    if most > context:
        raise ValueError(f"context: got {context}, expected at least the {most} slots of a head")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    timings = []
    for device in devices:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        own = config.with_dtype(dtype)
        names = _backends(own, device.type)
        pair = 2 * config.kv_heads * config.head_dim * dtype.itemsize
        needed = context * pair + len(names) * own.bytes_per_sequence()
        check_memory("context, batch", f"{context}, {batch}", batch * needed, device)
        shape = (batch, config.kv_heads, context, config.head_dim)
        keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        k, v = keys[:, :, :1].clone(), values[:, :, :1].clone()
        q = k.repeat_interleave(config.group, 1)
        caches = []
        for name in names:
            manager = CacheManager(own, maps, backend=name, transforms=transforms)
            state = manager.init(batch, device=device)
            _fill(state, context)
            caches.append((manager, state))
        full = functools.partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
        total = [0.0] * (1 + len(caches))
        for layer, count in Counter(own.layers).items():
            index = own.layers.index(layer)
            steps: list[Callable[[], object]] = [full]
            steps += [functools.partial(m.attend, s, index, q, k, v) for m, s in caches]
            for place, milliseconds in enumerate(_take_turns(steps, device)):
                total[place] += count * milliseconds
        labels = ["full cache", *(f"this cache ({name})" for name in names)]
        sizes = [config.num_layers * context * pair, *[own.bytes_per_sequence()] * len(names)]
        timings += [
            Timing(str(device), label, milliseconds, size)
            for label, milliseconds, size in zip(labels, total, sizes, strict=True)
        ]
    return timings


def _backends(config: CacheConfig, device: str) -> list[str]:
    """Every backend that runs this config on such a device, but for the slow reference."""
    names = []
    for name, entry in BACKENDS.items():
        if device not in entry.devices or name == "reference":
            continue
        if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
            continue
        try:
            get_backend(name).check_config(config)
        except ValueError:
            continue
        names.append(name)
    return names


def _fill(state: CacheState, length: int) -> None:
    """Let a cache be full of random pairs, as after `length` tokens."""
    for spec, layer in zip(state.config.layers, state.layers, strict=True):
        for pairs in (layer.keys, layer.values):
            # Codes are bytes; any will do.
            _ = pairs.normal_() if pairs.is_floating_point() else pairs.random_(0, 256)
        for scales in (layer.key_scales, layer.value_scales):
            if scales is not None:
                scales.fill_(0.5)
        if layer.scores is not None:
            layer.scores.uniform_()
        for head, capacity in enumerate(spec.capacities):
            newest = torch.arange(length - capacity, length)
            layer.positions[:, spec.head_slots(head)] = newest.to(layer.positions)
        layer.length.fill_(length)


def _some_transforms(config: CacheConfig) -> Transforms | None:
    """Bases fitted to random pairs, where the config needs some: they cost what others cost."""
    spec = config.layer(0)
    if spec.quantization is None or spec.quantization.transform != "calibrated":
        return None
    sums = []
    for heads in (spec.query_heads, spec.kv_heads, spec.kv_heads):
        sums.append(Moments.empty(heads, spec.head_dim))
        sums[-1].add(torch.randn(1, heads, 2 * spec.head_dim, spec.head_dim))
    q, k, v = sums
    projection = torch.randn(spec.head_dim, spec.query_heads, spec.head_dim)
    return Transforms("calibrated", [fit_layer(spec.quantization, q, k, v, projection)])


def _take_turns(steps: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Each step's median time in milliseconds."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(WARM_UP + REPEATS):
        for step, taken in zip(steps, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                taken.append((time.perf_counter() - started) * 1e3)
    return [median(taken) for taken in times]
