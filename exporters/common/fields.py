"""What JSON from a file must look like, and errors that name the field that does not."""

from __future__ import annotations

from typing import Any

_WORDS = {
    bool: "true or false",
    dict: "an object",
    int: "an integer",
    str: "a string",
    type(None): "null",
}


def check_fields(where: str, value: Any, wanted: Any) -> None:
    """Check that a value read from JSON has the form `wanted`.

    Parameters
    ----------
    where
        What errors begin with: a path, and the field in it.
    value
        From `json.loads`.
    wanted
        A type: bool, dict, int or str. A tuple: any of these types. A range: an integer in it. A
        frozenset: one of its members. A list of one form: any number of values of it. A dict: an
        object with at least these fields, of these forms.

    Raises
    ------
    ValueError
        If it has another form.
    """
    if isinstance(wanted, dict):
        check_fields(where, value, dict)
        if missing := [name for name in wanted if name not in value]:
            raise ValueError(f"{where}: lacks {missing}")
        for name, form in wanted.items():
            check_fields(f"{where}: {name}", value[name], form)
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: got {_brief(value)}, expected a list")
        for place, entry in enumerate(value):
            check_fields(f"{where}[{place}]", entry, wanted[0])
    elif isinstance(wanted, range):
        if type(value) is not int or value not in wanted:
            allowed = f"an integer {wanted[0]} to {wanted[-1]}"
            raise ValueError(f"{where}: got {_brief(value)}, expected {allowed}")
    elif isinstance(wanted, frozenset):
        if not isinstance(value, str) or value not in wanted:
            names = ", ".join(sorted(wanted))
            raise ValueError(f"{where}: got {_brief(value)}, expected one of {names}")
    else:
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        # A bool is an int to Python, not to JSON.
        if type(value) not in kinds:
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise ValueError(f"{where}: got {_brief(value)}, expected {words}")


def _brief(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
