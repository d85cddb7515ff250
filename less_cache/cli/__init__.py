"""The command line, ``less-cache``: a file a command."""

from .main import app, main

__all__ = ["app", "main"]
