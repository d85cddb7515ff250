"""``python -m less_cache.cli``."""

from .main import main

main()
