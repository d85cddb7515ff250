"""Eviction policies: data that says how a pair earns its place in the cache, and what is protected.

A policy holds no tensors. Which pair leaves is the same rule for all of them: of the unprotected
pairs, the one with the least (score, position). A policy only decides what the score is: what a
pair starts with (`Start`), and what it gains from the queries that see it (`Gain`).
"""

from .base import FAIR_SHARE, Gain, Policy, Start
from .builtin import (
    H2O,
    TOVA,
    DecayedH2O,
    FullCache,
    KeyNorm,
    ObservationWindow,
    Scissorhands,
    SinkWindow,
)
from .registry import (
    DEFAULT_POLICY,
    POLICIES,
    check_registered,
    parse_policy,
    policy_from_dict,
    register_policy,
)

__all__ = [
    "DEFAULT_POLICY",
    "FAIR_SHARE",
    "H2O",
    "POLICIES",
    "TOVA",
    "DecayedH2O",
    "FullCache",
    "Gain",
    "KeyNorm",
    "ObservationWindow",
    "Policy",
    "Scissorhands",
    "SinkWindow",
    "Start",
    "check_registered",
    "parse_policy",
    "policy_from_dict",
    "register_policy",
]
