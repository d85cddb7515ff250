"""less_cache: a KV cache of small and constant size that keeps most of what it forgets.

LESS (arXiv 2402.09398): an eviction policy keeps C key-value pairs per head, and what it evicts
is merged, through two small trained feature maps, into a low-rank state that every later query
still reads.
"""

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
