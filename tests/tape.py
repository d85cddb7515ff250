"""What a CUDA graph does, on a CPU: operators and kernels on a tape, with the tensors they were at.

As in a graph, recording runs nothing (what ran is taken back), a replay runs no Python of the
step's, every number that Python gave is frozen, and reading a tensor while recording is an error.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from less_cache import graphs
from less_cache.backends.triton import launch as launching
from less_cache.backends.triton import ready

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
"""Operators that wait for the device."""

UNSET = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")


class Tape(TorchDispatchMode):
    """Stands in for `graphs.CudaRecorder`."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.done, self.before, self.replays = [], [], 0

    def warm_up(self, call):
        return call()

    def record(self, call):
        self.done, self.before = [], []
        original = ready.launch
        ready.launch = self.launch
        try:
            with self:
                found = call()
        finally:
            ready.launch = original
            for tensor, old in reversed(self.before):
                tensor.copy_(old)
        return found

    def replay(self):
        self.replays += 1
        for run in self.done:
            run()

    def keep(self, tensor):
        self.before.append((tensor, tensor.clone()))

    def launch(self, kernel, grid, arguments, constants, **given):
        with _disable_current_modes():
            for tensor in arguments.values():
                if isinstance(tensor, torch.Tensor):
                    self.keep(tensor)
            self.done.append(lambda: launching.launch(kernel, grid, arguments, constants, **given))
            self.done[-1]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in READS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [
            given[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in given
        ]
        for tensor in tree_leaves(changed):
            self.keep(tensor)
        found = func(*args, **kwargs)
        if changed:
            self.done.append(lambda: func(*args, **kwargs))
        elif not func.is_view and name not in UNSET:
            self.done.append(lambda: self._again(func, args, kwargs, found))
        return found

    @staticmethod
    def _again(func, args, kwargs, found):
        new = tree_leaves(func(*args, **kwargs))
        for old, tensor in zip(tree_leaves(found), new, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(tensor)


def use_tapes(monkeypatch):
    """Let captured steps go onto tapes, on any device; gives the list of these."""
    made = []

    def tape(device):
        made.append(Tape(device))
        return made[-1]

    monkeypatch.setattr(graphs, "Recorder", tape)
    monkeypatch.setattr(graphs, "check_graphs", lambda name, device: None)
    return made
