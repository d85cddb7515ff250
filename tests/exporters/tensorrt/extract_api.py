"""Write ``tensorrt_api.json``: the names that TensorRT's Python API has, read from its bindings.

    python extract_api.py TENSORRT_REPOSITORY tensorrt_api.json

The argument is a checkout of NVIDIA's TensorRT repository; its folder ``python/src`` holds the
pybind11 sources that the ``tensorrt`` package is built from. Only names are taken: classes and
their bases, methods with their parameters, properties, members of enumerations.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = (
    "infer/pyCore.cpp",
    "infer/pyFoundationalTypes.cpp",
    "infer/pyGraph.cpp",
    "infer/pyPlugin.cpp",
    "parsers/pyOnnx.cpp",
)

CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "Dims",
    "ICudaEngine",
    "IBuilderConfig",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IPluginCreatorInterface",
    "IPluginRegistry",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "ParserError",
    "PreviewFeature",
    "Runtime",
    "Severity",
    "TensorIOMode",
)
"""What an engine's build and its running touch."""

FUNCTIONS = ("get_plugin_registry", "init_libnvinfer_plugins")

_START = re.compile(r"\b(?:py|pybind11)::(class_|enum_)\s*<")
_MEMBER = re.compile(
    r"\.\s*(def|def_static|def_property|def_property_readonly|def_readwrite|value)\s*\("
)
_ARGUMENT = re.compile(r'"(\w+)"_a(\s*=)?|py::arg\("(\w+)"\)(\s*=)?')


def extract(repository: Path) -> dict[str, Any]:
    """Classes and enumerations by name, and the version they are of."""
    source = repository / "python" / "src"
    named: dict[str, str] = {}
    found: dict[str, Any] = {}
    functions: dict[str, list[list[str]]] = {}
    for name in SOURCES:
        text = _without_comments((source / name).read_text(encoding="utf-8"))
        for start in re.finditer(r"\bm\s*\.\s*def\s*\(", text):
            arguments, _ = _balanced(text, start.end() - 1, "()")
            quoted = re.match(r'\s*"(\w+)"', arguments)
            if quoted and quoted[1] in FUNCTIONS:
                functions[quoted[1]] = [_parameters(arguments)]
        for entry in _entries(text):
            named[entry["cpp"][0]] = entry["name"]
            old = found.setdefault(entry["name"], entry)
            if old is not entry:
                old["methods"].update(entry["methods"])
    classes = {}
    for name in CLASSES:
        if name not in found:
            raise SystemExit(f"{name}: not found in {source}")
        entry = found[name]
        bases = [named[base] for base in entry["cpp"][1:] if named.get(base) in CLASSES]
        kept = {key: entry[key] for key in ("members", "methods", "properties") if entry[key]}
        classes[name] = {"bases": bases, **kept}
    return {"version": _version(repository), "classes": classes, "functions": functions}


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)


def _parameters(arguments: str) -> list[str]:
    return [(a or c) + ("?" if b or d else "") for a, b, c, d in _ARGUMENT.findall(arguments)]


def _version(repository: Path) -> str:
    text = (repository / "include" / "NvInferVersion.h").read_text(encoding="utf-8")
    parts = ("MAJOR", "MINOR", "PATCH", "BUILD")
    numbers = []
    for part in parts:
        found = re.search(rf"#define TRT_{part}_\w+ (\d+)", text)
        if found is None:
            raise SystemExit(f"include/NvInferVersion.h: no TRT_{part}_...")
        numbers.append(found[1])
    return ".".join(numbers)


def _entries(text: str) -> Iterator[dict[str, Any]]:
    starts = list(_START.finditer(text))
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        types, rest = _balanced(text, start.end() - 1, "<>")
        declared = re.match(r'\s*(\w*)\s*[({]\s*[\w.]+\s*,\s*"(\w+)"', text[rest:])
        if declared is None:
            continue
        variable, name = declared.groups()
        # Those of a class end with the statement; a module's functions may follow.
        body = text[rest : min(end, _statement_end(text, rest))]
        for more in re.finditer(rf"\b{variable}\.def" if variable else "(?!)", text):
            body += text[more.start() : _statement_end(text, more.start())]
        entry: dict[str, Any] = {"name": name, "members": [], "methods": {}, "properties": []}
        entry["cpp"] = [part.strip().split("::")[-1] for part in _split(types)]
        for member in _MEMBER.finditer(body):
            arguments, _ = _balanced(body, member.end() - 1, "()")
            _add(entry, member[1], arguments)
        entry["properties"] = sorted(set(entry["properties"]))
        yield entry


def _add(entry: dict[str, Any], kind: str, arguments: str) -> None:
    quoted = re.match(r'\s*"(\w+)"', arguments)
    if kind == "value" and quoted:
        entry["members"].append(quoted[1])
    elif kind.startswith(("def_property", "def_readwrite")) and quoted:
        readable = quoted[1]
        entry["properties"].append(
            readable + ("" if kind != "def_property_readonly" else " (read)")
        )
    elif quoted or "py::init" in arguments:
        name = quoted[1] if quoted else "__init__"
        parameters = _parameters(arguments)
        signatures = entry["methods"].setdefault(name, [])
        if parameters not in signatures:
            signatures.append(parameters)


def _balanced(text: str, start: int, pair: str) -> tuple[str, int]:
    """What stands between a bracket and its partner, and where the text goes on."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = text.index('"', i + 1)
            while text[i - 1] == "\\":
                i = text.index('"', i + 1)
        elif text[i] == pair[0]:
            depth += 1
        elif text[i] == pair[1] and text[i - 1] != "-":
            depth -= 1
            if not depth:
                return text[start + 1 : i], i + 1
        i += 1
    raise SystemExit(f"no {pair[1]} for the {pair[0]} at {start}")


def _statement_end(text: str, start: int) -> int:
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = text.index('"', i + 1)
        elif text[i] in "({":
            depth += 1
        elif text[i] in ")}":
            depth -= 1
        elif text[i] == ";" and depth <= 0:
            break
        i += 1
    return i


def _split(types: str) -> list[str]:
    parts, depth = [""], 0
    for letter in types:
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    data = extract(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(
        json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )
