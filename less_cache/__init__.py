"""less_cache: a KV cache of small and constant size that keeps most of what it forgets.

LESS (arXiv 2402.09398): an eviction policy keeps C key-value pairs per head, and what it evicts
is merged, through two small trained feature maps, into a low-rank state that every later query
still reads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import CacheConfig
from .feature_maps import FeatureMaps
from .manager import CacheManager
from .policies import (
    H2O,
    TOVA,
    DecayedH2O,
    FullCache,
    KeyNorm,
    Policy,
    Scissorhands,
    SinkWindow,
)
from .state import CacheState, LayerState

if TYPE_CHECKING:
    from .integrations.transformers import LessCache as LessCache
    from .integrations.transformers import attach as attach

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "TOVA",
    "CacheConfig",
    "CacheManager",
    "CacheState",
    "DecayedH2O",
    "FeatureMaps",
    "FullCache",
    "KeyNorm",
    "LayerState",
    "Policy",
    "Scissorhands",
    "SinkWindow",
]


def __getattr__(name: str) -> Any:
    # transformers is optional, and slow to import: only who asks for these two pays for it.
    if name not in ("LessCache", "attach"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"less_cache.{name} needs transformers: pip install 'less_cache[transformers]'"
        ) from error
    return getattr(importlib.import_module(".integrations.transformers", __name__), name)
