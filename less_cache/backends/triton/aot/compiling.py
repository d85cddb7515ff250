"""Kernels to machine code, for GPUs that need not be here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch import INTERPRETED, Launch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass
class Signature:
    """A kernel's parameters, as the compiler takes them.

    Attributes
    ----------
    types
        By name: ``"*fp16"``, ``"i32"``, ``"constexpr"``, ...
    constants
        Values of those that are ``"constexpr"``.
    multiples
        By name: a power of two that the number, or the address in bytes, is a multiple of.
    """

    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)

    def fix(self, name: str, value: Any) -> None:
        """Compile `value` in."""
        self.types[name], self.constants[name] = "constexpr", value
        self.multiples.pop(name, None)

    def pass_on(self, name: str, kind: str, multiple: int = 1) -> None:
        """Let the caller give it, as a parameter of type `kind`."""
        self.types[name] = kind
        self.constants.pop(name, None)
        self.multiples[name] = multiple

    @property
    def parameters(self) -> dict[str, str]:
        """Those that the machine code takes, in order: name and type."""
        return {name: kind for name, kind in self.types.items() if kind != "constexpr"}


def signature(wanted: Launch) -> Signature:
    """Types, constants and alignments that Triton itself would compile a launch with.

    Tensors are taken to begin at multiples of 16 bytes, as torch's own do.
    """
    found = Signature()
    for parameter in wanted.kernel.params:
        name = parameter.name
        if name in wanted.constants:
            found.fix(name, wanted.constants[name])
            continue
        value = wanted.arguments[name]
        plain = parameter.do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not plain):
            found.fix(name, value)
        elif isinstance(value, Tensor):
            plain = plain or parameter.do_not_specialize_on_alignment
            found.pass_on(name, "*" + TYPES[value.dtype], 1 if plain else 16)
        else:
            kind = "i32" if value < 2**31 else "i64"
            found.pass_on(name, kind, 16 if value % 16 == 0 and not plain else 1)
    return found


def compile_kernel(wanted: Launch, parameters: Signature, capability: int) -> Any:
    """Compile a launch's kernel for one GPU; Triton keeps what it compiled on disk.

    Parameters
    ----------
    wanted
        From `recording`: the kernel, its warps and stages.
    parameters
        Of `signature`, or changed.
    capability
        80, 86, 90, ...

    Returns
    -------
    triton.compiler.CompiledKernel
        ``asm["cubin"]``, ``asm["ptx"]`` and ``metadata``.

    Raises
    ------
    RuntimeError
        If it runs under the interpreter, which has no compiler.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, but the compiler needs it unset")
    names = wanted.kernel.arg_names
    source = ASTSource(
        wanted.kernel,
        {name: parameters.types[name] for name in names},
        {(names.index(name),): value for name, value in parameters.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", multiple]]
            for name, multiple in parameters.multiples.items()
            if multiple > 1
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=wanted.options)
