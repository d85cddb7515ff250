"""The command line, ``less-cache``: demo, train, distill, merge, eval, export, bench, info."""

from .main import app, main

__all__ = ["app", "main"]
