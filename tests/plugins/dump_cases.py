"""Write decode steps and what the float64 reference makes of them, for the plugin's GPU tests.

::

    python -m tests.plugins.dump_cases --out plugins/trt/build/cases

``index.tsv`` has a line a case: its name, the layer, the batch, tolerances of the output and of the
state, and a file. The file holds the node's inputs one after another, then ``out`` and the state in
float64 (positions int32, history int64, bytes of codes as int8), each head's slots sorted by
position.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import less_cache as lc
from less_cache.quantization import BITS, TRANSFORMS
from tests.helpers import random_maps
from tests.plugins.lines import layer_fields, line
from tests.plugins.steps import DTYPES, Case, Step, taken
from tests.quantization.fitted import fitted

HIDDEN = 32
GOLDEN = Path(__file__).parents[1] / "conformance" / "golden"
MAPS = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2")

POLICIES = (
    lc.FullCache(),
    lc.SinkWindow(sinks=2),
    lc.H2O(),
    lc.TOVA(),
    lc.Scissorhands(window=9),
    lc.KeyNorm(sinks=1, recent=2),
    lc.DecayedH2O(factor=0.9),
)


CODES = (
    *(lc.Quantization(bits, bits, transform) for bits in BITS for transform in TRANSFORMS),
    lc.Quantization(4, 2, "calibrated"),
    lc.Quantization(3, 8),
)

Drawn = tuple[Case, Callable[[], lc.FeatureMaps | None], Callable[[], list[np.ndarray]]]
"""A case, its maps and its tokens."""


def random_cases() -> Iterator[Drawn]:
    """All policies, kinds and dtypes, with what fills a grid and what does not."""
    shapes = itertools.cycle(
        # heads, KV heads, capacity, batch, prompt
        ((1, 1, 17, 1, 40), (4, 4, 64, 3, 50), (8, 2, 33, 17, 70), (6, 3, 2048, 2, 2060))
    )
    for number, (dtype, head_dim, rank, policy) in enumerate(
        itertools.product(DTYPES, (64, 128), (0, 8, 16), POLICIES)
    ):
        heads, kv_heads, capacity, batch, prompt = next(shapes)
        if isinstance(policy, lc.FullCache):
            prompt = min(prompt, capacity - 1)
        config = lc.CacheConfig(
            1, heads, kv_heads, head_dim, capacity=capacity, policy=policy, rank=rank, dtype=dtype
        )
        kind = "exp" if number % 2 else "paper"
        name = f"{type(policy).__name__}-{dtype}-{head_dim}-{rank}-{kind}-{capacity}"
        yield drawn(Case(name, config, kind, batch, prompt, number))


def coded_cases() -> Iterator[Drawn]:
    """All numbers of bits in both bases, with a low-rank state and without."""
    shapes = itertools.cycle(
        ((4, 4, 64, 3, 90), (8, 2, 33, 9, 70), (4, 1, 2100, 2, 2110), (2, 2, 17, 1, 40))
    )
    policies = itertools.cycle((lc.H2O(), lc.SinkWindow(sinks=2), lc.Scissorhands(window=9)))
    axes = itertools.product(DTYPES, (0, 8), CODES, (64, 128))
    for number, (dtype, rank, codes, head_dim) in enumerate(axes):
        heads, kv_heads, capacity, batch, prompt = next(shapes)
        policy = next(policies)
        config = lc.CacheConfig(
            1,
            heads,
            kv_heads,
            head_dim,
            capacity=capacity,
            policy=policy,
            rank=rank,
            dtype=dtype,
            quantization=codes,
        )
        kind = "exp" if number % 2 else "paper"
        bits = f"{codes.key_bits}+{codes.value_bits}-{codes.transform}"
        name = f"{type(policy).__name__}-{dtype}-{head_dim}-{rank}-{kind}-{capacity}-{bits}"
        yield drawn(Case(name, config, kind, batch, prompt, number))


def drawn(case: Case) -> Drawn:
    """A case with random maps and tokens."""
    return (
        case,
        lambda: random_maps(case.config, case.kind, case.seed, HIDDEN),
        lambda: random_tokens(case, np.random.default_rng(case.seed)),
    )


def bases(config: lc.CacheConfig) -> lc.Transforms | None:
    """Those of calibrated codes."""
    codes = config.quantization
    return fitted(config) if codes is not None and codes.transform == "calibrated" else None


def golden_cases() -> Iterator[Drawn]:
    """The official code's traces: the first step after the prompt, and a later one."""
    for name in ("h2o_mha", "h2o_mqa", "lambda_mha"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            trace = dict(file)
        q, k, v = (trace[array][None].astype(np.float64) for array in "qkv")
        heavy, recent, prompt = (int(trace[field]) for field in ("heavy", "recent", "prompt_len"))
        policy: lc.Policy = lc.H2O(recent=recent)
        if str(trace["policy"]) != "h2o":
            policy = lc.SinkWindow(sinks=heavy, recent=recent)
        config = lc.CacheConfig(
            num_layers=1,
            query_heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=q.shape[3],
            capacity=heavy + recent + 1,
            policy=policy,
            rank=trace["z"].shape[2],
            dtype="float32",
        )
        maps = lc.FeatureMaps.from_tensors([{field: trace[field] for field in MAPS}])
        for steps in (0, 9):
            case = Case(f"golden-{name}-{steps}", config, "paper", 1, prompt + steps, 0)
            tokens = [array[:, :, : prompt + steps + 1] for array in (q, k, v)]
            yield case, lambda maps=maps: maps, lambda tokens=tokens: tokens


def random_tokens(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    config = case.config
    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    tokens = case.prompt + 1
    return [rng.normal(size=(case.batch, h, tokens, config.head_dim)) for h in heads]


def dump(step: Step, case: Case, folder: Path) -> str:
    """Write one case; its line of the index."""
    content = [raw(tensor) for tensor in step.inputs.values()]
    content.append(raw(torch.from_numpy(step.out)))
    content += [raw(torch.from_numpy(np.ascontiguousarray(x))) for x in step.after.values()]
    (folder / f"{case.name}.bin").write_bytes(b"".join(content))
    fields = layer_fields(step.layer, step.kind, HIDDEN)
    return line(case.name, *fields, step.batch, *step.bounds, f"{case.name}.bin")


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, in C order."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose names contain it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for case, maps, tokens in itertools.chain(random_cases(), coded_cases(), golden_cases()):
        if options.only in case.name:
            step = taken(case, maps(), tokens(), bases(case.config))
            if step is not None:
                lines.append(dump(step, case, options.out))
    (options.out / "index.tsv").write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} cases: {options.out}")


if __name__ == "__main__":
    main()
