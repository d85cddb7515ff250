"""A model's layers, and the heads of each that one node attends for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from exporters.common.heads import run_name
from less_cache import ops
from less_cache.layer_config import LayerConfig, Run

from .parts import Layer


@dataclass(frozen=True)
class HeadRun:
    """KV heads of equal capacity side by side: what one node attends for.

    Parameters
    ----------
    name
        What the names of its arrays begin with: ``"3"``, or ``"3.h2"``.
    run
        Which heads of the layer.
    layer
        They alone, as the bodies see them.
    """

    name: str
    run: Run
    layer: Layer

    @property
    def arrays(self) -> dict[str, str]:
        """Full names of its arrays, by their names in `less_cache.ops`."""
        return {name: f"{self.name}.{name}" for name in ops.state_names(self.layer.config)}


@dataclass(frozen=True)
class ModelLayer:
    """One layer of a model.

    Parameters
    ----------
    index
        Its number.
    config
        Shapes, capacities, policies and dtypes.
    kind
        The kind of its feature maps; ``None`` at rank 0.
    window
        How many tokens a query of a sliding-window layer sees, itself included; 0: all.
    """

    index: int
    config: LayerConfig
    kind: str | None
    window: int = 0

    @cached_property
    def runs(self) -> tuple[HeadRun, ...]:
        """Its heads, grouped where equal ones stand side by side."""
        return tuple(
            HeadRun(
                run_name(self.index, self.config, run),
                run,
                Layer(run.layer, self.kind, self.window),
            )
            for run in self.config.runs
        )
