"""The few instructions of PTX that unpack codes, carried out by NumPy."""

from __future__ import annotations

import re

import numpy as np

WORD = 2**32 - 1


def run(text: str, constraints: str, taken: list[int]) -> list[int]:
    """What the text gives: the registers marked ``=``, the others being `taken`."""
    given = constraints.split(",").count("=&r")
    assert constraints.count(",") + 1 == given + len(taken)
    registers = {f"${given + i}": value for i, value in enumerate(taken)}
    body = re.fullmatch(r"\{ \.reg \.b32 [\w, ]+; (.*) \}", text).group(1)
    for line in body.rstrip(";").split(";"):
        name, _, rest = line.strip().partition(" ")
        to, *sources = rest.split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[to] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(given)]


def prmt(a: int, b: int, selection: int) -> int:
    """Four bytes of the eight in b and a, the lowest selected by the lowest four bits."""
    source = (b << 32 | a).to_bytes(8, "little")
    chosen = [selection >> 4 * i & 0xF for i in range(4)]
    assert max(chosen) < 8, "a sign would be copied"
    return int.from_bytes(bytes(source[i] for i in chosen), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit (a << 2 | b << 1 | c) of the table, for each bit."""
    found = 0
    for i in range(32):
        place = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        found |= (table >> place & 1) << i
    return found


def sub_f16x2(a: int, b: int) -> int:
    """Differences of the two halves as float16."""
    halves = [np.array([x], dtype=np.uint32).view(np.float16) for x in (a, b)]
    return int((halves[0] - halves[1]).view(np.uint32)[0])


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shr.b32": lambda a, count: a >> count,
    "shl.b32": lambda a, count: a << count & WORD,
    "sub.f16x2": sub_f16x2,
}
