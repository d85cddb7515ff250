"""Nothing imports upward: no circles between modules, and each floor knows only those below it.

Every import counts, also one inside a function or under ``if TYPE_CHECKING``: it is a dependency
all the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("less_cache", "exporters")

OUTSIDE_TRANSFORMERS = (
    "less_cache.integrations",
    "less_cache.training",
    "less_cache.evaluation",
    "less_cache.reference_model",
    "less_cache.cli",
)


class Import:
    """One import of one module by another."""

    def __init__(self, module: str, target: str, line: int, where: str) -> None:
        self.module, self.target = module, target
        self.line, self.where = line, where

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target} ({self.where})"


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, where: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, where)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, base] if base else outer)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                target = inner if inner in MODULES else base
                yield Import(module, target, node.lineno, where)
        else:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                where = "in a function"
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                where = "under TYPE_CHECKING"
            for child in ast.iter_child_nodes(node):
                yield from visit(child, where)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "at the top")


IMPORTS = [found for module, path in MODULES.items() for found in imports_of(module, path)]


def circles() -> list[list[Import]]:
    """The imports of each circle."""
    edges: dict[str, dict[str, Import]] = {module: {} for module in MODULES}
    for edge in IMPORTS:
        if edge.target in MODULES:
            edges[edge.module].setdefault(edge.target, edge)
    found = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            circle = [*path[path.index(module) :], module]
            found.append([edges[first][second] for first, second in pairwise(circle)])
            return
        if module in done:
            return
        for target in sorted(edges[module]):
            walk(target, [*path, module])
        done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def offenders(importers: list[str], forbidden: tuple[str, ...]) -> list[str]:
    found = [x for x in IMPORTS if x.module in importers and within(x.target, forbidden)]
    return [str(x) for x in found]


def test_there_are_no_circles():
    found = circles()
    assert not found, "\n\n".join("\n".join(map(str, circle)) for circle in found)


def test_the_library_knows_the_exporters_by_its_command_line_only():
    importers = [m for m in MODULES if within(m, ("less_cache",))]
    importers = [m for m in importers if not m.startswith("less_cache.cli")]
    assert not offenders(importers, ("exporters",))


def test_only_the_top_floors_know_transformers():
    importers = [
        m for m in MODULES if within(m, ("less_cache",)) and not within(m, OUTSIDE_TRANSFORMERS)
    ]
    assert not offenders(importers, ("transformers", "tokenizers"))


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("exporters.common", ("exporters.onnx", "exporters.tensorrt", "onnx", "onnxscript")),
        ("exporters.common", ("onnxruntime", "tensorrt", "transformers")),
        ("exporters.onnx", ("exporters.tensorrt", "tensorrt")),
        ("exporters", ("examples", "benchmarks", "tests")),
        ("less_cache", ("examples", "benchmarks", "tests")),
    ],
)
def test_rooms_keep_to_themselves(room, forbidden):
    assert not offenders([m for m in MODULES if within(m, (room,))], forbidden)


@pytest.mark.parametrize("runtime", ["exporters.onnx.runtime", "exporters.tensorrt.runtime"])
def test_running_a_model_needs_neither_onnx_nor_transformers(runtime):
    reached, ahead = set(), [runtime]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            tops = [x for x in IMPORTS if x.module == module and x.where == "at the top"]
            ahead.extend(x.target for x in tops if x.target in MODULES)
            # To import a module is to import the packages around it.
            ahead.extend(name for name in MODULES if module.startswith(f"{name}."))
    found = [x for x in IMPORTS if x.module in reached and x.where == "at the top"]
    forbidden = ("onnx", "onnxscript", "onnx_ir", "transformers")
    assert not [str(x) for x in found if within(x.target, forbidden)]
