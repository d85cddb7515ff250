"""Triton's interpreter made quicker: nothing that it computes changes."""

import importlib.util
from types import SimpleNamespace


def hasten() -> None:
    """Spare the interpreter what takes most of the time of our kernels under it."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_once_a_launch(interpreter, tl)
    find_dtypes_once(interpreter, tl)
    make_types_once(tl.core)
    name_tuples_when_asked(tl.core)


def patch_once_a_launch(interpreter, tl) -> None:
    """Patch `triton.language` once a launch, not at every call of one function by another."""
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


def find_dtypes_once(interpreter, tl) -> None:
    """Look up NumPy's dtype for each of Triton's once, in a table that is not made at each call."""
    original, known = interpreter._get_np_dtype, {}

    def found(kind):
        name = (kind.element_ty if isinstance(kind, tl.block_type) else kind).name
        if name not in known:
            known[name] = original(kind)
        return known[name]

    interpreter._get_np_dtype = found


def make_types_once(core) -> None:
    """Check, measure and name each type of block once, not at every operation that gives one."""
    original, known = core.block_type.__init__, {}

    def init(self, element_ty, shape):
        sizes = tuple(core._unwrap_if_constexpr(size) for size in shape)
        if isinstance(element_ty, core.pointer_type):
            original(self, element_ty, [*sizes])
            return
        if (element_ty, sizes) not in known:
            original(self, element_ty, [*sizes])
            known[element_ty, sizes] = dict(self.__dict__)
        self.__dict__.update(known[element_ty, sizes])

    core.block_type.__init__ = init


def name_tuples_when_asked(core) -> None:
    """Find out the type of a tuple, such as every tensor's shape, when somebody asks for it."""
    original = core.tuple.__init__

    def init(self, args, *given, **named):
        if any(one is not None for one in (*given, *named.values())):
            original(self, args, *given, **named)
        else:
            self.values = [*args]

    def found(self):
        if "found" not in self.__dict__:
            self.__dict__["found"] = core._type_for_tuple_values(self.values)
        return self.__dict__["found"]

    def put(self, value):
        self.__dict__["found"] = value

    core.tuple.__init__ = init
    core.tuple.type = property(found, put)
