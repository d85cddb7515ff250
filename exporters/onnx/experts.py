"""Mixtures of experts in a form that a graph of fixed operators can hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

TRACEABLE = "batched_mm"
"""transformers' only way with experts that neither loops over them nor needs a kernel of its own:
each token gathers the weights of the experts it chose."""


@contextlib.contextmanager
def traceable_experts(model: Any) -> Iterator[None]:
    """Let a model's experts, if it has any, be computed in the `TRACEABLE` way within the block."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation(TRACEABLE)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
