"""What the reference makes of docstrings: types and formulas."""

from __future__ import annotations

import functools
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """``q, k`` of one entry get their own types; ``::`` becomes a colon."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the docstrings of a package."""
        self._visit(pkg)

    def _visit(self, thing: Any) -> None:
        for member in thing.members.values():
            if not member.is_alias:
                self._visit(member)
        if thing.docstring is not None:
            thing.docstring = _Docstring(
                thing.docstring.value.replace("::\n", ":\n"),
                lineno=thing.docstring.lineno,
                endlineno=thing.docstring.endlineno,
                parent=thing,
                parser=thing.docstring.parser,
                parser_options=thing.docstring.parser_options,
            )


class _Docstring(griffe.Docstring):
    """Is parsed when it is shown: before, a dataclass has no parameters."""

    @functools.cached_property
    def parsed(self) -> list[griffe.DocstringSection]:
        sections = self.parse()
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for entry in section.value:
                    entry.annotation = (
                        _annotation(self.parent, entry) or entry.annotation
                    )
        return sections


def _annotation(thing: Any, entry: griffe.DocstringParameter) -> Any:
    """The type of a function's parameter, or of a dataclass's field."""
    if thing.is_class and entry.name in thing.members:
        return getattr(thing.members[entry.name], "annotation", None)
    function = thing.members.get("__init__") if thing.is_class else thing
    parameters = getattr(function, "parameters", ())
    return parameters[entry.name].annotation if entry.name in parameters else None
