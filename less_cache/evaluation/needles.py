"""Texts that hide what is asked for in the end: a pass key, one of many keys, chains of variables.

After RULER (arXiv 2404.06654), made by seed, of a given length, with what is asked for at a given
depth. Written as prose or as Python code, which is all that the shipped model has read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._checks import check_choice, check_int

TASKS = ("passkey", "multikey", "variables")
STYLES = ("prose", "code")
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
OTHER_KEYS = 3
HOPS = 4
"""Assignments from one variable to the next after the first."""


@dataclass(frozen=True)
class Example:
    """A prompt and what belongs after it.

    Parameters
    ----------
    prompt
        Token ids.
    reference
        Token ids of the right continuation.
    answers
        The texts that must come; in any order.
    """

    prompt: list[int]
    reference: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _Parts:
    """What a task hides, by where it belongs, and what it asks."""

    opening: str
    hidden: tuple[tuple[float, str], ...]
    question: str
    reference: str
    answers: tuple[str, ...]


def make_example(
    task: str,
    tokenize: Callable[[str], list[int]],
    *,
    length: int,
    depth: float,
    style: str,
    seed: int,
    filler: Sequence[str],
) -> Example:
    """One text of at most `length` tokens.

    Parameters
    ----------
    task
        ``"passkey"``: one number; ``"multikey"``: one of four, the others anywhere;
        ``"variables"``: a number, and variables that get it one from the other, to the end.
    tokenize
        A text's token ids.
    length
        Tokens of the prompt, at most; as many as lines of filler make.
    depth
        Where the number stands: 0 is the beginning, 1 the end.
    style
        ``"prose"`` or ``"code"``.
    seed
        Of names, numbers and filler.
    filler
        Lines, none of them empty; taken in order from one that the seed chooses.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, or the length too small for what is hidden.
    """
    check_choice("task", task, TASKS)
    check_choice("style", style, STYLES)
    check_int("length", length, minimum=1)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: got {depth}, expected 0 to 1")
    if not filler or not all(line.strip() for line in filler):
        raise ValueError("filler: got no lines, or empty ones, expected lines of text")
    draws = random.Random(f"{task} {style} {seed}")
    parts = {"passkey": _passkey, "multikey": _multikey, "variables": _variables}[task](
        draws, style, depth
    )
    first = draws.randrange(len(filler))
    lines: list[str] = []
    prompt = tokenize(_text(parts, lines))
    while len(prompt) < length:
        # Lines side by side may have fewer tokens than each alone, so this may take some rounds.
        room = length - len(prompt)
        while room > 0:
            lines.append(filler[(first + len(lines)) % len(filler)])
            room -= max(1, len(tokenize(lines[-1] + "\n")))
        prompt = tokenize(_text(parts, lines))
    while len(prompt) > length:
        if not lines:
            raise ValueError(
                f"length: got {length}, but what {task} hides and asks takes {len(prompt)} tokens"
            )
        lines.pop()
        prompt = tokenize(_text(parts, lines))
    whole = tokenize(_text(parts, lines) + parts.reference)
    return Example(prompt, whole[len(prompt) :], parts.answers)


def _text(parts: _Parts, lines: Sequence[str]) -> str:
    """The lines with what is hidden between them."""
    placed = sorted(parts.hidden, key=lambda entry: entry[0])
    found, taken = [], 0
    for depth, line in placed:
        place = round(depth * len(lines))
        found += [*lines[taken:place], line]
        taken = max(taken, place)
    found += lines[taken:]
    return parts.opening + "\n".join(found) + "\n" + parts.question


def _number(draws: random.Random) -> str:
    return str(draws.randrange(10_000, 100_000))


def _name(draws: random.Random) -> str:
    return "".join(draws.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))


def _passkey(draws: random.Random, style: str, depth: float) -> _Parts:
    number = _number(draws)
    if style == "code":
        return _Parts(
            "", ((depth, f"PASS_KEY = {number}"),), "PASS_KEY =", f" {number}\n", (number,)
        )
    return _Parts(
        "A pass key is hidden in this text. Remember it.\n",
        ((depth, f"The pass key is {number}."),),
        "What is the pass key? The pass key is",
        f" {number}.",
        (number,),
    )


def _multikey(draws: random.Random, style: str, depth: float) -> _Parts:
    names = [_name(draws) for _ in range(1 + OTHER_KEYS)]
    numbers = [_number(draws) for _ in names]
    places = [depth, *(draws.random() for _ in range(OTHER_KEYS))]
    form = "KEY_{0} = {1}" if style == "code" else "The magic number for {0} is {1}."
    hidden = tuple(
        (place, form.format(name, number))
        for place, name, number in zip(places, names, numbers, strict=True)
    )
    if style == "code":
        return _Parts("", hidden, f"KEY_{names[0]} =", f" {numbers[0]}\n", (numbers[0],))
    return _Parts(
        "Some magic numbers are hidden in this text. Remember them.\n",
        hidden,
        f"What is the magic number for {names[0]}? The magic number for {names[0]} is",
        f" {numbers[0]}.",
        (numbers[0],),
    )


def _variables(draws: random.Random, style: str, depth: float) -> _Parts:
    names = [_name(draws) for _ in range(1 + HOPS)]
    number = _number(draws)
    step = (1 - depth) / (HOPS + 1)
    values = [number, *(names[:-1] if style == "code" else (f"VAR {x}" for x in names[:-1]))]
    form = "{0} = {1}" if style == "code" else "VAR {0} = {1}"
    hidden = tuple(
        (depth + step * i, form.format(name, value))
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    )
    if style == "code":
        question = f"# The {len(names)} variables that are {number}:"
        return _Parts("", hidden, question, f" {', '.join(names)}\n", tuple(names))
    return _Parts(
        "Track the chain of variable assignments that is hidden in this text.\n",
        hidden,
        f"Which variables were assigned the value {number}? By the chain of assignments in the "
        f"text above these {len(names)} variables were assigned the value {number}:",
        f" {', '.join(names)}",
        tuple(names),
    )
