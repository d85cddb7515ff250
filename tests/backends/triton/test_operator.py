"""The kernels behind an operator: a compiled step holds one node a layer, and traces no launch."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import less_cache as lc
from tests.backends.triton.oracle import DEVICE, config
from tests.helpers import random_maps


def test_a_compiled_step_launches_behind_an_operator():
    torch._dynamo.reset()
    cache = config(num_layers=2, policy=lc.H2O(recent=2), group=2)
    manager = lc.CacheManager(cache, random_maps(cache, "exp", 0, hidden=24), backend="triton")
    eager, state = manager.init(2, device=DEVICE), manager.init(2, device=DEVICE)
    nodes = []
    counter = CompileCounterWithBackend("aot_eager")

    def backend(graph, examples):
        nodes.extend(str(node.target) for node in graph.graph.nodes if "step_" in str(node.target))
        return counter(graph, examples)

    def whole(held, q, k, v, mask):
        first = manager.attend(held, 0, q, k, v, mask)
        return manager.attend(held, 1, first, k, v, mask)

    step = torch.compile(whole, fullgraph=True, backend=backend)
    for turn in range(9):
        q, k, v = (torch.randn(2, heads, 1, 16, device=DEVICE) for heads in (4, 2, 2))
        mask = torch.tensor([[True], [turn % 3 > 0]], device=DEVICE)
        torch.testing.assert_close(step(state, q, k, v, mask), whole(eager, q, k, v, mask))
    assert counter.frame_count == 1
    assert len(nodes) == 2, nodes
    for own, other in zip(state.layers, eager.layers, strict=True):
        for name, array in other.arrays().items():
            torch.testing.assert_close(own.arrays()[name], array, msg=name)
