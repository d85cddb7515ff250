"""A typing stub of TensorRT's Python API, from ``tensorrt_api.json``.

    python -m tests.exporters.tensorrt.stub

writes ``stubs/tensorrt.pyi``, which mypy reads where the package itself is not installed: a name
or a parameter that TensorRT does not have is a type error then.
"""

from __future__ import annotations

import json
import keyword
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
API, STUB = HERE / "tensorrt_api.json", HERE / "stubs" / "tensorrt.pyi"
NESTED = {"Severity": "ILogger"}
RETURNS = {
    "create_builder_config": "IBuilderConfig",
    "create_execution_context": "IExecutionContext | None",
    "create_network": "INetworkDefinition",
    "create_optimization_profile": "IOptimizationProfile",
    "create_timing_cache": "ITimingCache | None",
    "deserialize_cuda_engine": "ICudaEngine | None",
    "get_error": "ParserError",
    "get_plugin_registry": "IPluginRegistry",
    "get_timing_cache": "ITimingCache",
}
"""What methods give, where the rest of the API is reached through it."""


def stub(api: dict[str, Any]) -> str:
    """The stub's text."""
    lines = ["# Written by tests/exporters/tensorrt/stub.py.", "# ruff: noqa", "# fmt: off"]
    lines += ["from typing import Any, overload", ""]
    lines += ["__version__: str", ""]
    for name, signatures in sorted(api["functions"].items()):
        lines += _functions(name, signatures, "", first=[])
    for name, entry in api["classes"].items():
        if name not in NESTED:
            lines += ["", *_class(name, entry, api)]
    return "\n".join(lines) + "\n"


def _class(name: str, entry: dict[str, Any], api: dict[str, Any]) -> list[str]:
    bases = f"({', '.join(entry['bases'])})" if entry["bases"] else ""
    lines = [f"class {name}{bases}:"]
    for inner, outer in NESTED.items():
        if outer == name:
            lines += [f"    {line}" for line in _class(inner, api["classes"][inner], api)]
            lines += [f"    {member}: {inner}" for member in api["classes"][inner]["members"]]
    for member in entry.get("members", []):
        lines.append(f"    {member}: {'ILogger.' if name in NESTED else ''}{name}")
    if entry.get("members"):
        lines.append("    def __int__(self) -> int: ...")
    for entry_name in entry.get("properties", []):
        if entry_name.endswith(" (read)"):
            plain = entry_name.removesuffix(" (read)")
            lines += ["    @property", f"    def {plain}(self) -> Any: ..."]
        else:
            lines.append(f"    {entry_name}: Any")
    for method, signatures in entry.get("methods", {}).items():
        if not method.startswith("__") or method == "__init__":
            lines += _functions(method, signatures, "    ", first=["self"])
    return lines if len(lines) > 1 else [f"class {name}{bases}: ..."]


def _functions(
    name: str, signatures: list[list[str]], indent: str, *, first: list[str]
) -> list[str]:
    lines = []
    for signature in signatures:
        parameters, optional = [*first], False
        for parameter in signature:
            plain = parameter.removesuffix("?")
            plain += "_" if keyword.iskeyword(plain) else ""
            optional = optional or parameter.endswith("?")
            parameters.append(f"{plain}: Any{' = ...' if optional else ''}")
        if len(signatures) > 1:
            lines.append(f"{indent}@overload")
        returned = "None" if name == "__init__" else RETURNS.get(name, "Any")
        lines.append(f"{indent}def {name}({', '.join(parameters)}) -> {returned}: ...")
    return lines


if __name__ == "__main__":
    STUB.parent.mkdir(exist_ok=True)
    STUB.write_text(stub(json.loads(API.read_text(encoding="utf-8"))), encoding="utf-8")
