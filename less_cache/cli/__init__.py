"""The command line, ``less-cache``: a file a command.

Among them demo; train, distill, merge; eval, longrange, reproduce, lm-eval; export; bench, info.
"""

from .main import app, main

__all__ = ["app", "main"]
