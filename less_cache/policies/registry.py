"""The policies by name: what files, the command line, the tests and the docs read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from . import builtin
from .base import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy
    for policy in (
        builtin.FullCache,
        builtin.SinkWindow,
        builtin.H2O,
        builtin.DecayedH2O,
        builtin.ObservationWindow,
        builtin.TOVA,
        builtin.Scissorhands,
        builtin.KeyNorm,
    )
}

DEFAULT_POLICY = "sinkwindow"
"""Where nobody names one: with many slots it is the best or nearly so, and its steps have no scores
to add up (docs/quality.md)."""


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Make a policy of your own known by its class's name; a class decorator.

    Snapshots and exports then can be read back, and the command line takes it, in every process
    that has run this line.

    Raises
    ------
    TypeError
        If it is no dataclass that subclasses `Policy`.
    ValueError
        If another policy has that name.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise TypeError(f"policy: got {policy!r}, expected a subclass of Policy")
    taken = POLICIES.get(policy.__name__)
    # A module that is loaded again brings its own classes again.
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        policy.__module__,
        policy.__qualname__,
    ):
        raise ValueError(f"policy: the name {policy.__name__!r} is taken by {taken!r}")
    POLICIES[policy.__name__] = policy
    return policy


def check_registered(policy: Policy) -> None:
    """Refuse a policy that `policy_from_dict` would not find.

    Raises
    ------
    ValueError
        If its class is not registered.
    """
    name = type(policy).__name__
    if POLICIES.get(name) is not type(policy):
        raise ValueError(
            f"policy: {policy} is a policy of your own, which no other process would know; call "
            "less_cache.register_policy on its class here and where it is read back"
        )


def policy_from_dict(data: dict[str, Any]) -> Policy:
    """Read a registered policy back from `Policy.to_dict`'s data.

    Raises
    ------
    ValueError, TypeError
        If the name is not registered, or a field does not belong to that policy.
    """
    if not isinstance(data, dict):
        raise TypeError(f"policy: got {type(data).__name__}, expected a dict of its fields")
    fields = dict(data)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(POLICIES)}")
    known = {field.name for field in dataclasses.fields(POLICIES[name])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"policy {name}: unknown field(s) {unknown}, expected some of {sorted(known)}"
        )
    return POLICIES[name](**fields)


def parse_policy(text: str) -> Policy:
    """A policy from its command-line spelling: ``h2o``, ``sinkwindow:sinks=4``, ``tova``.

    Raises
    ------
    ValueError
        If the name or a field is unknown, or a value is not a number.
    """
    name, _, arguments = text.partition(":")
    wanted = name.strip().lower().replace("_", "").replace("-", "")
    by_lower = {known.lower(): known for known in POLICIES}
    if wanted not in by_lower:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(by_lower)}")
    fields: dict[str, Any] = {"name": by_lower[wanted]}
    for item in filter(None, arguments.split(",")):
        key, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"policy {name}: {item!r} is not of the form field=number") from None
        if not math.isfinite(number):
            raise ValueError(f"policy {name}: {item!r} is not a finite number")
        whole = number.is_integer() and key.strip() != "factor"
        fields[key.strip()] = int(number) if whole else number
    return policy_from_dict(fields)
