"""The sizes that an engine is built for, and the shapes of its inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from exporters.common.manifest import Manifest
from less_cache._checks import check_int

Shape = tuple[int, ...]

MAX_SORTED = 3839
"""TensorRT sorts fewer than 3840 numbers; a prompt sorts its tokens and the pairs held.

Where that leaves no room for a prompt as long as the cache, the order is counted instead.
"""


@dataclass(frozen=True)
class Limits:
    """Sizes of batches and prompts.

    Parameters
    ----------
    max_batch, max_prompt
        The most sequences, and the most tokens of each at once.
    opt_batch, opt_prompt
        The sizes that engines are tuned for.
    """

    max_batch: int
    max_prompt: int
    opt_batch: int
    opt_prompt: int

    def to_dict(self) -> dict[str, int]:
        """The four numbers by name, for JSON."""
        return asdict(self)


def check_limits(
    manifest: Manifest,
    max_batch: Any,
    max_prompt: Any,
    opt_batch: Any = None,
    opt_prompt: Any = None,
) -> Limits:
    """Limits from what a user gave; ``None`` tunes for the largest.

    Raises
    ------
    TypeError, ValueError
        If one is out of range, or TensorRT cannot sort so many pairs.
    """
    check_int("max_batch", max_batch, minimum=1)
    check_int("max_prompt", max_prompt, minimum=2)
    slots = manifest.largest_capacity
    if slots + max_prompt > MAX_SORTED and not counts_order(manifest):
        raise ValueError(
            f"max_prompt: got {max_prompt}, expected at most {MAX_SORTED - slots}: TensorRT sorts "
            f"at most {MAX_SORTED} numbers, and the model's largest cache has {slots} slots. A "
            "longer prompt can be appended in chunks"
        )
    for name, value, most in (
        ("opt_batch", opt_batch, max_batch),
        ("opt_prompt", opt_prompt, max_prompt),
    ):
        if value is not None:
            check_int(name, value, minimum=1, maximum=most)
    return Limits(max_batch, max_prompt, opt_batch or max_batch, opt_prompt or max_prompt)


def counts_order(manifest: Manifest) -> bool:
    """Whether a cache is too large for TensorRT to sort it with a prompt."""
    return manifest.largest_capacity > MAX_SORTED // 2


def input_shapes(
    manifest: Manifest, limits: Limits, *, step: bool
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The least, the usual and the largest shape of each input of an engine, by name.

    Parameters
    ----------
    manifest
        The exported model's.
    limits
        From `check_limits`.
    step
        For the step's engine; otherwise for the prompt's.
    """
    batches = (1, limits.opt_batch, limits.max_batch)
    tokens = (1, 1, 1) if step else (1, limits.opt_prompt, limits.max_prompt)
    columns = tuple(zip(batches, tokens, strict=True))
    shapes: dict[str, Any] = dict.fromkeys(("input_ids", "attention_mask"), columns)
    for spec in manifest.state:
        shapes[f"past.{spec.name}"] = tuple((batch, *spec.shape) for batch in batches)
    return shapes
