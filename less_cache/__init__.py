"""less_cache: a KV cache of small and constant size that keeps most of what it forgets.

LESS (arXiv 2402.09398): an eviction policy keeps C key-value pairs per head, and what it evicts
is merged, through two small trained feature maps, into a low-rank state that every later query
still reads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .arrays import LayerArrays, Page, empty_arrays
from .config import CacheConfig
from .feature_maps import FeatureMaps
from .graphs import CapturedStep
from .manager import CacheManager
from .ops import StepPlan, plan_step, step
from .policies import (
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
    Start,
    register_policy,
)
from .quantization import Quantization
from .quantization.transforms import Transforms
from .recipe import CacheRecipe
from .state import CacheState, LayerState

if TYPE_CHECKING:
    from .integrations.transformers import FullAttentionWarning as FullAttentionWarning
    from .integrations.transformers import LessCache as LessCache
    from .integrations.transformers import attach as attach

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "TOVA",
    "CacheConfig",
    "CacheManager",
    "CacheRecipe",
    "CacheState",
    "CapturedStep",
    "DecayedH2O",
    "FeatureMaps",
    "FullCache",
    "Gain",
    "KeyNorm",
    "LayerArrays",
    "LayerState",
    "ObservationWindow",
    "Page",
    "Policy",
    "Quantization",
    "Scissorhands",
    "SinkWindow",
    "Start",
    "StepPlan",
    "Transforms",
    "empty_arrays",
    "plan_step",
    "register_policy",
    "step",
]


def __getattr__(name: str) -> Any:
    # transformers is optional, and slow to import: only who asks for these pays for it.
    if name not in ("FullAttentionWarning", "LessCache", "attach"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"less_cache.{name} needs transformers: install less_cache[transformers]"
        ) from error
    return getattr(importlib.import_module(".integrations.transformers", __name__), name)
