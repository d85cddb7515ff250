"""Triton's interpreter made quicker: nothing that it computes changes."""

import importlib.util
from types import SimpleNamespace


def hasten() -> None:
    """Let the interpreter patch `triton.language` once a launch.

    By itself it does so at every call of one function by another, which is a good part of the time
    that our kernels take under it.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original, nothing, launched = interpreter._patch_lang, interpreter._LangPatchScope(), False
    # Kernels see the one module, triton's own functions the other.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    class Launch:
        def __init__(self):
            nonlocal launched
            launched, self.scope = True, original(both)

        def restore(self):
            nonlocal launched
            self.scope.restore()
            launched = False

    interpreter._patch_lang = lambda fn: nothing if launched else Launch()
