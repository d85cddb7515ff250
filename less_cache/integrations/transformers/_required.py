"""The oldest transformers that the integration works with: checked before all else is imported."""

from __future__ import annotations

import re

import transformers

REQUIRED = (5, 17)
"""Its cache layers have the interface of ours."""

_found = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:2])
if _found < REQUIRED:
    raise ImportError(
        f"less_cache needs transformers {'.'.join(map(str, REQUIRED))} or later, but "
        f"{transformers.__version__} is installed: pip install --upgrade transformers"
    )
