"""A module that passes for ``tensorrt``: it has the real one's names, no others, and records calls.

Classes, methods, parameters, properties and enumerations come from ``tensorrt_api.json``; what is
not in there raises `AttributeError` or `TypeError`, as it would with the real package. What the
few methods that matter do is in `behaviour`.
"""

from __future__ import annotations

import enum
import importlib.machinery
import inspect
import json
import types
from typing import Any

from .behaviour import BEHAVIOURS, TensorRT
from .stub import API, NESTED


class Recorded:
    """One call: of which class, which method, with which arguments by name."""

    def __init__(self, owner: str, method: str, arguments: dict[str, Any]) -> None:
        self.owner, self.method, self.arguments = owner, method, arguments

    def __repr__(self) -> str:
        return f"{self.owner}.{self.method}({self.arguments})"


def fake_tensorrt() -> types.ModuleType:
    """A new module, with nothing registered and nothing recorded.

    Its ``world`` is the `TensorRT` that all its objects share.
    """
    api = json.loads(API.read_text(encoding="utf-8"))
    module: Any = types.ModuleType("tensorrt")
    # Without one, asking whether there is such a module fails.
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    module.__version__ = api["version"]
    module.calls = []
    module.world = TensorRT(module)
    for name, entry in api["classes"].items():
        made = _enumeration(name, entry) if "members" in entry else _class(module, name, entry)
        if name in NESTED:
            owner = getattr(module, NESTED[name])
            type.__setattr__(owner, name, made)
            for member in made:
                type.__setattr__(owner, member.name, member)
        else:
            setattr(module, name, made)
    for name, signatures in api["functions"].items():
        setattr(module, name, _method(module, "", name, signatures, getattr(module.world, name)))
    return module


def _enumeration(name: str, entry: dict[str, Any]) -> Any:
    # pybind's enumerations are no integers, but have them.
    made = enum.Enum(name, {member: i for i, member in enumerate(entry["members"])})
    made.__int__ = lambda self: self.value
    return made


def _class(module: Any, name: str, entry: dict[str, Any]) -> type:
    bases = tuple(getattr(module, base) for base in entry["bases"])
    behaviour = BEHAVIOURS.get(name)
    namespace: dict[str, Any] = {}
    for method, signatures in entry.get("methods", {}).items():
        if method.startswith("__") and method != "__init__":
            continue
        work = getattr(behaviour, method, None) if behaviour else None
        namespace[method] = _method(module, name, method, signatures, work, bound=True)
    writable = set()
    for each in entry.get("properties", []):
        plain = each.removesuffix(" (read)")
        if plain == each:
            writable.add(plain)
        if behaviour and isinstance(getattr(behaviour, plain, None), property):
            namespace[plain] = getattr(behaviour, plain)

    def set_attribute(self: Any, key: str, value: Any) -> None:
        # Python's own subclasses have a dictionary, and what is not public is this file's.
        if type(self) is made and key not in writable and not key.startswith("_"):
            raise AttributeError(f"{name} has no writable attribute {key!r}")
        if type(self) is made and not key.startswith("_"):
            module.calls.append(Recorded(name, key, {"value": value}))
        object.__setattr__(self, key, value)

    namespace["__setattr__"] = set_attribute
    if behaviour and hasattr(behaviour, "as_buffer"):
        bases = (bytes,)
        namespace.pop("__setattr__")
    made = type(name, bases, namespace)
    return made


def _method(
    module: Any,
    owner: str,
    name: str,
    signatures: list[list[str]],
    work: Any,
    *,
    bound: bool = False,
) -> Any:
    """A function that takes what the real one takes, records the call and does the work."""
    forms = [
        inspect.Signature(
            [
                inspect.Parameter(
                    each.removesuffix("?"),
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=None if optional else inspect.Parameter.empty,
                )
                for each, optional in _optional(signature)
            ]
        )
        for signature in signatures
    ]

    def call(*arguments: Any, **named: Any) -> Any:
        own, given = (arguments[:1], arguments[1:]) if bound else ((), arguments)
        for form in forms:
            try:
                bound_arguments = form.bind(*given, **named).arguments
            except TypeError:
                continue
            module.calls.append(Recorded(owner, name, dict(bound_arguments)))
            if bound and name == "__init__":
                object.__setattr__(own[0], "_world", module.world)
            elif bound and not hasattr(own[0], "_world"):
                raise TypeError(f"{owner}.__init__() must be called when overriding __init__")
            return work(*own, **bound_arguments) if work is not None else None
        raise TypeError(
            f"{owner}.{name}: incompatible arguments {given}, {named}; has {signatures}"
        )

    return call


def _optional(signature: list[str]) -> list[tuple[str, bool]]:
    """Parameters, and whether they may be left out; what follows such a one may be too."""
    seen, result = False, []
    for each in signature:
        seen = seen or each.endswith("?")
        result.append((each, seen))
    return result
