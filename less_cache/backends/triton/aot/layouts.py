"""Which kinds of caches kernels are compiled for ahead of time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ....config import CacheConfig
from ....layer_config import LayerConfig
from ....policies import (
    H2O,
    FullCache,
    Gain,
    KeyNorm,
    Policy,
    Scissorhands,
    SinkWindow,
    Start,
    policy_from_dict,
)
from ....quantization import BITS, TRANSFORMS, Quantization
from ..launch import block

Score = tuple[Start, Gain]
"""What a score is made of."""

POLICIES: dict[Score, Policy] = {
    (policy.starts, policy.gains): policy
    for policy in (FullCache(), SinkWindow(), KeyNorm(recent=1), H2O(), Scissorhands())
}
"""One policy for each kind of score; the others differ from these in numbers alone."""

MANIFEST = "less_cache.json"


@dataclass(frozen=True)
class Layout:
    """What the machine code of a decode step depends on; all other sizes are parameters.

    Parameters
    ----------
    dtype, state_dtype
        Of the model, and of keys and values that are stored as they are; of H and z.
    head_dim
        D.
    score
        What starts and gains the policy's scores have.
    kind
        Of the feature maps; ``None`` at rank 0.
    group
        1, or a number up to which every G > 1 is served.
    rank
        A number up to which ranks are served; 0: rank 0 only.
    rank_multiple
        Ranks are multiples of it.
    softcap
        On the logits, or ``None``.
    codes
        How pairs are coded; ``None``: they are stored as they are.
    """

    dtype: str = "float16"
    state_dtype: str = "float32"
    head_dim: int = 128
    score: Score = (Start.ZERO, Gain.SUM)
    kind: str | None = "exp"
    group: int = 1
    rank: int = 16
    rank_multiple: int = 4
    softcap: float | None = None
    codes: Quantization | None = None

    @property
    def example(self) -> LayerConfig:
        """A layer of this kind."""
        return CacheConfig(
            num_layers=1,
            query_heads=2 * self.group,
            kv_heads=2,
            head_dim=self.head_dim,
            capacity=256,
            policy=POLICIES[self.score],
            rank=self.rank,
            softcap=self.softcap,
            dtype=self.dtype,
            state_dtype=self.state_dtype,
            quantization=self.codes,
        ).layer(0)


def layouts_of_export(folder: Path) -> list[Layout]:
    """The layouts of an exported model's layers.

    Parameters
    ----------
    folder
        What ``less-cache export onnx`` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder has no manifest, or not one that can be read, or a policy without kernels.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; less-cache export onnx writes it")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        config = CacheConfig.from_dict(manifest["config"])
        # Layers with sliding windows store pairs as they are, and are none of the config's.
        given = iter(config.quantizations)
        layers = [
            _layout(config, layer, None if layer.get("window") else next(given, None))
            for layer in manifest["layers"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the manifest of an exported model: {error!r}") from None
    return list(dict.fromkeys(layers))


def usual_layouts() -> list[Layout]:
    """Half precision, heads of 64 and 128, all policies, both kinds of maps, ranks to 16."""
    return _product(("float16", "bfloat16"), (64, 128), (16,))


def every_layout() -> list[Layout]:
    """All dtypes, all head sizes and ranks that the backend has."""
    return _product(("float16", "bfloat16", "float32"), (64, 80, 96, 128, 256), (16, 32, 64))


def coded_layouts() -> list[Layout]:
    """Each number of bits in both bases, as many for keys as for values; else as the usual ones.

    Half precision is float16 alone: a model in bfloat16 has other maps.
    """
    codes = [Quantization(bits, bits, t) for bits, t in itertools.product(BITS, TRANSFORMS)]
    usual = _product(("float16",), (64, 128), (16,))
    return [replace(layout, codes=own) for layout in usual for own in codes if _can_be(layout, own)]


def sample_layouts() -> list[Layout]:
    """One for pairs that are stored as they are and one for codes, to try a build with."""
    return [Layout(head_dim=64), Layout(head_dim=64, codes=Quantization(3, 3))]


LAYOUTS: dict[str, Callable[[], list[Layout]]] = {
    "sample": sample_layouts,
    "usual": usual_layouts,
    "coded": coded_layouts,
    "every": every_layout,
}


def _product(
    dtypes: tuple[str, ...], head_dims: tuple[int, ...], ranks: tuple[int, ...]
) -> list[Layout]:
    maps = [(None, 0), *itertools.product(("paper", "exp"), ranks)]
    axes = itertools.product(dtypes, head_dims, POLICIES, maps, (1, 16))
    return [
        Layout(dtype, head_dim=head_dim, score=score, kind=kind, rank=rank, group=group)
        for dtype, head_dim, score, (kind, rank), group in axes
    ]


def _can_be(layout: Layout, codes: Quantization) -> bool:
    """Whether a config would take it: calibrated keys have other norms."""
    return layout.score[0] is not Start.KEY_NORM or codes.transform != "calibrated"


def _layout(config: CacheConfig, layer: dict[str, Any], codes: Quantization | None) -> Layout:
    policy = policy_from_dict(layer["policy"])
    if policy.custom:
        raise ValueError(f"policy: {policy} has scores of Python code, and no kernels")
    rank = int(layer["rank"])
    group = config.query_heads // config.kv_heads
    return Layout(
        dtype=config.dtype,
        state_dtype=config.state_dtype if rank else "float32",
        head_dim=config.head_dim,
        score=(policy.starts, policy.gains),
        kind=layer["maps"],
        group=group if group == 1 else block(group),
        rank=block(rank) if rank else 0,
        rank_multiple=min(16, rank & -rank) if rank else 1,
        softcap=config.softcap,
        codes=codes,
    )
