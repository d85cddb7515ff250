"""A whole decode step as one CUDA graph: captured once, replayed for every token.

A replay runs none of the Python between kernels: what the host counts is counted here, and what a
graph would silently get wrong is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import check_dense
from .arrays import lasting
from .call import check_room
from .manager import CacheManager
from .state import CacheState

CAPTURABLE = "triton"
"""The backend whose decode steps never look at what the device holds."""

Step = Callable[..., Any]
"""Takes tensors, and returns a tensor or a tuple of tensors."""


class CudaRecorder:
    """What PyTorch's CUDA graphs are to a captured step.

    Parameters
    ----------
    device
        A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph: Any = None

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run `call` as it is to be recorded later: all that is made once is made now."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = call()
            # What it returned lives in the side stream's memory, and is read in the current one.
            side.synchronize()
        return found

    def record(self, call: Callable[[], Any]) -> Any:
        """Record what `call` launches, without running it; its result is what replays fill."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            found = call()
        self._graph = graph
        return found

    def replay(self) -> None:
        """Launch on the device's current stream all that was recorded."""
        with torch.cuda.device(self.device):
            self._graph.replay()


class CapturedStep:
    """A decode step of a whole model, captured as a CUDA graph.

    The first call runs the step as ever, which compiles what there is to compile; the second
    captures it and replays that; later ones replay. Between calls the state may be changed in
    place (`CacheState.reset`, `CacheState.reorder`), and prompts may go through
    `CacheManager.attend`: the graph works on the state's arrays, whatever they hold.

    Parameters
    ----------
    manager, state
        Of the cache; the state's backend must be ``"triton"``.
    step
        Called with tensors, it calls ``manager.attend(state, layer, ...)`` once for each layer with
        one new token of each sequence, and returns a tensor or a tuple of tensors. What else it
        reads must stay where it is: a graph knows addresses. Its Python code runs twice, and never
        again: what differs from token to token, such as positions, must be among its tensors.
        It may not wait for the device (``.item()``, ``print`` of a tensor, a branch on one).

    Raises
    ------
    TypeError, ValueError
        If these are no manager and no state of its kind, the state is on no CUDA device, or the
        backend's steps cannot be captured: another than ``"triton"``, or a policy of your own.
    """

    def __init__(self, manager: CacheManager, state: CacheState, step: Step) -> None:
        if not isinstance(manager, CacheManager):
            raise TypeError(f"manager: got {type(manager).__name__}, expected a CacheManager")
        if not isinstance(state, CacheState):
            raise TypeError(f"state: got {type(state).__name__}, expected a CacheState from init()")
        if not callable(step):
            raise TypeError(f"step: got {type(step).__name__}, expected a function of tensors")
        if state.is_numpy:
            raise ValueError("state: holds NumPy arrays, but a CUDA graph needs a CUDA device")
        device = state.layers[0].keys.device
        check_capturable(manager, "state", device)
        manager.adopt(state)
        self.manager = manager
        self.state = state
        self.step = step
        self.device = device
        self._recorder: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._captured = False

    def __call__(self, *inputs: Tensor) -> Any:
        """Decode one token of each sequence.

        Parameters
        ----------
        *inputs
            What `step` takes: on the state's device, each time of the same shapes and dtypes.

        Returns
        -------
        Tensor or tuple of Tensor
            What `step` returns, in memory of its own.

        Raises
        ------
        ValueError, TypeError
            If an input is not as in the first call, a sequence would have more tokens than its
            policy takes, or `step` did not attend once in each layer with one token; unless in
            the last case, nothing has changed.
        RuntimeError
            If `step` cannot be captured; nothing has changed, and the next call tries again.
        """
        self._check_inputs(inputs)
        self._check_room()
        if self._recorder is None:
            return self._first(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if not self._captured:
            self._capture()
        with self.state.turn():
            self._recorder.replay()
            for layer in self.state.layers:
                layer.tokens_bound += 1
        return _copied(self._outputs)

    def _first(self, inputs: tuple[Tensor, ...]) -> Any:
        bounds = [layer.tokens_bound for layer in self.state.layers]
        with lasting():
            self._inputs = [
                torch.empty(given.shape, dtype=given.dtype, device=self.device) for given in inputs
            ]
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        recorder = Recorder(self.device)
        found = recorder.warm_up(self._call)
        brought = [
            layer.tokens_bound - bound
            for layer, bound in zip(self.state.layers, bounds, strict=True)
        ]
        if set(brought) != {1}:
            raise ValueError(
                f"step: attended from {brought} new tokens, by layer, but a captured step attends "
                "once in each layer of `state`, from one token"
            )
        self._recorder = recorder
        return _copied(found)

    def _capture(self) -> None:
        # As if nothing had been counted: nothing runs.
        bounds = [layer.tokens_bound for layer in self.state.layers]
        try:
            self._outputs = self._recorder.record(self._call)
        except RuntimeError as error:
            raise RuntimeError(
                f"step: cannot be captured in a CUDA graph, which must neither wait for the device "
                f"nor depend on what it holds: {error}"
            ) from error
        finally:
            for layer, bound in zip(self.state.layers, bounds, strict=True):
                layer.tokens_bound = bound
        self._captured = True

    def _call(self) -> Any:
        with torch.no_grad():
            found = self.step(*self._inputs)
        parts = found if isinstance(found, tuple) else (found,)
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"step: returned {type(part).__name__}, expected a tensor or a tuple of tensors"
                )
        return found

    def _check_inputs(self, inputs: tuple[Any, ...]) -> None:
        for place, given in enumerate(inputs):
            name = f"inputs[{place}]"
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: got {type(given).__name__}, expected a tensor")
            check_dense(name, given)
            if given.device != self.device:
                raise ValueError(f"{name}: on device {given.device}, expected {self.device}")
        if self._recorder is None:
            return
        kinds = [[(tuple(x.shape), x.dtype) for x in some] for some in (inputs, self._inputs)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"inputs: got {kinds[0]}, but the graph is made for {kinds[1]}; another batch "
                "needs a CapturedStep of its own"
            )

    def _check_room(self) -> None:
        """Refuse a token too many in any layer before one changes."""
        for plan, held in zip(self.state.plan.layers, self.state.layers, strict=True):
            if held.tokens_bound + 1 > plan.most_tokens:
                length = held.length.cpu()
                held.tokens_bound = int(length.max())
                check_room(plan.layer, length, None, 1)


def check_capturable(manager: CacheManager, name: str, device: torch.device) -> None:
    """Refuse what no graph can be made of.

    Parameters
    ----------
    manager
        Its config and backend are looked at.
    name
        Of the argument that says where the arrays are, for the message.
    device
        That place.

    Raises
    ------
    ValueError
        That names the argument.
    """
    check_graphs(name, device)
    for i, policy in enumerate(manager.config.policies):
        if policy.custom:
            raise ValueError(
                f"policy: layer {i} has {policy}, whose scores are Python code, which a CUDA graph "
                "does not run"
            )
    backend = manager.backend_on(device.type)
    if backend != CAPTURABLE:
        raise ValueError(
            f"backend: got {backend!r}, which looks at the device's numbers in the midst of a "
            f"step; only {CAPTURABLE!r} can be captured in a CUDA graph"
        )


def check_graphs(name: str, device: torch.device) -> None:
    """Refuse a device that has no CUDA graphs.

    Raises
    ------
    ValueError
        If it is none of CUDA's.
    """
    if device.type != "cuda":
        raise ValueError(f"{name}: on {str(device)!r}, but a CUDA graph needs a CUDA device")


Recorder: Any = CudaRecorder
"""Makes what records and replays."""


def _copied(found: Any) -> Any:
    return tuple(x.clone() for x in found) if isinstance(found, tuple) else found.clone()
