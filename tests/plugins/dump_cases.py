"""Write decode steps and what the float64 reference makes of them, for the plugin's GPU tests.

::

    python -m tests.plugins.dump_cases --out plugins/trt/build/cases

``index.tsv`` has a line a case: its name, the layer, the batch, tolerances of the output and of the
state, and a file. The file holds the node's inputs one after another, then ``out`` and the state in
float64 (positions int32, history int64), each head's slots sorted by position.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import less_cache as lc
from less_cache import ops
from less_cache.backends.triton.decode import KINDS
from tests.conformance.cases import ORACLE, BackendCase, Runner
from tests.conformance.scenarios import CloseCall
from tests.helpers import random_maps

HIDDEN = 32
GOLDEN = Path(__file__).parents[1] / "conformance" / "golden"
MAPS = ("phi_w1", "phi_w2", "psi_w1", "psi_w2", "psi_w3", "psi_s1", "psi_s2")

DTYPES = {
    "float32": BackendCase("plugin", "triton", "float32", 2e-5, 5e-5),
    "float16": BackendCase("plugin", "triton", "float16", 1e-2, 1e-2),
    "bfloat16": BackendCase("plugin", "triton", "bfloat16", 6e-2, 6e-2),
}

POLICIES = (
    lc.FullCache(),
    lc.SinkWindow(sinks=2),
    lc.H2O(),
    lc.TOVA(),
    lc.Scissorhands(window=9),
    lc.KeyNorm(sinks=1, recent=2),
    lc.DecayedH2O(factor=0.9),
)


@dataclass(frozen=True)
class Case:
    """One step: the layer, and the tokens before it (more than the capacity, or not)."""

    name: str
    config: lc.CacheConfig
    kind: str
    batch: int
    prompt: int
    seed: int


def random_cases() -> Iterator[Case]:
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
        yield Case(name, config, kind, batch, prompt, number)


def golden_cases() -> Iterator[tuple[Case, lc.FeatureMaps, list[np.ndarray]]]:
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
            yield case, maps, [array[:, :, : prompt + steps + 1] for array in (q, k, v)]


def random_tokens(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    config = case.config
    heads = (config.query_heads, config.kv_heads, config.kv_heads)
    tokens = case.prompt + 1
    return [rng.normal(size=(case.batch, h, tokens, config.head_dim)) for h in heads]


def dump(
    case: Case, maps: lc.FeatureMaps | None, tokens: list[np.ndarray], folder: Path
) -> str | None:
    """Write one case; its line of the index, or ``None`` for a close call."""
    own = DTYPES[case.config.dtype]
    rng = np.random.default_rng(case.seed)
    maps = own.rounded_maps(maps)
    tokens = [own.rounded(array) for array in tokens]
    oracle = Runner(ORACLE, case.config, maps, case.batch)
    # Rows of unlike lengths, some of them empty; the last token is missing from some rows.
    mask = np.ones((case.batch, case.prompt), dtype=bool)
    present = np.ones((case.batch, 1), dtype=bool)
    if case.batch > 1:
        starts = rng.integers(0, case.prompt, size=case.batch)
        mask = np.arange(case.prompt)[None] >= starts[:, None]
        present = rng.random((case.batch, 1)) < 0.8
    oracle.attend(*(array[:, :, :-1] for array in tokens), mask)
    layer = case.config.layer(0)
    names = ops.state_names(layer)
    state = oracle.state.layers[0]
    for name in names:
        array = getattr(state, name)
        if name in ("keys", "values"):
            array[...] = own.rounded(array)
        elif array.dtype.kind == "f":
            array[...] = array.astype(np.float32)
    q, k, v = (np.where(present[:, None, :, None], array[:, :, -1:], np.nan) for array in tokens)
    content = [raw(array, layer.dtype) for array in (q, k, v)]
    content += [raw(present, "int32"), raw(state.length, "int32")]
    for name in names:
        content.append(raw(getattr(state, name), dtype_of(name, layer.dtype)))
    if maps is not None:
        for name in ops.map_names(case.kind):
            narrow = name in ("phi_w1", "phi_w2", "psi_w1", "psi_w2")
            array = maps[0].tensors[name].numpy()
            content.append(raw(array, layer.dtype if narrow else "float32"))
    close = CloseCall()
    with close.watch():
        out = oracle.attend(q, k, v, present)
    if close.met:
        return None
    held = oracle.held()
    content.append(raw(np.where(present[:, None, :, None], out, 0.0), "float64"))
    for name in names:
        dtype = dtype_of(name, "float64")
        wide = "float64" if dtype.startswith("float") else dtype
        content.append(raw(getattr(held, name), wide))
    (folder / f"{case.name}.bin").write_bytes(b"".join(content))
    hidden = 0 if maps is None else maps[0].tensors["phi_w1"].shape[2]
    policy = layer.policy
    fields = (
        case.name,
        *(layer.query_heads, layer.kv_heads, layer.head_dim, hidden, layer.dtype, "float32"),
        *(int(policy.starts), int(policy.gains), policy.sinks, policy.protected_recent),
        *(policy.decay, policy.history_window, layer.capacity, layer.rank),
        *(KINDS[case.kind] if maps else 0, layer.scale, layer.softcap or 0.0),
        *(case.batch, own.outputs, own.state, f"{case.name}.bin"),
    )
    return "\t".join(map(str, fields))


def dtype_of(name: str, dtype: str) -> str:
    """Of a state's array, in a cache of `dtype`."""
    if name in ("keys", "values"):
        return dtype
    return {"positions": "int32", "history": "int64"}.get(name, "float32")


def raw(array: np.ndarray, dtype: str) -> bytes:
    """The array's bytes, in C order."""
    tensor = torch.as_tensor(np.ascontiguousarray(array)).to(getattr(torch, dtype))
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose names contain it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    drawn = (
        (
            case,
            random_maps(case.config, case.kind, case.seed, HIDDEN),
            random_tokens(case, np.random.default_rng(case.seed)),
        )
        for case in random_cases()
        if options.only in case.name
    )
    golden = (given for given in golden_cases() if options.only in given[0].name)
    for case, maps, tokens in itertools.chain(drawn, golden):
        line = dump(case, maps, tokens, options.out)
        if line is not None:
            lines.append(line)
    (options.out / "index.tsv").write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} cases: {options.out}")


if __name__ == "__main__":
    main()
