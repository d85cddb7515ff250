"""Stored pairs in a few bits a number: how many, in which basis, and how they are packed."""

from .layout import CodeLayout, code_layout
from .settings import BITS, TRANSFORMS, Quantization

__all__ = ["BITS", "TRANSFORMS", "CodeLayout", "Quantization", "code_layout"]
