"""The backend that compiles attention over codes: the same as torch's, compiled and not."""

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.backends import inductor
from tests.helpers import random_maps
from tests.quantization.fitted import coded_config, some_tokens
from tests.quantization.test_step import feed, manager

CHUNKS = (5, 1, 1, 9, 1, 1, 1, 4, 1)


@pytest.fixture
def compiler():
    """Skips where there is none."""
    try:
        inductor.check_config(coded_config())
    except ValueError as error:
        pytest.skip(str(error))


def compare(config, *, rtol=1e-9):
    runs = [manager(config, name) for name in ("torch", "inductor")]
    states = [run.init(2) for run in runs]
    wanted, found = (
        feed(run, config, state, CHUNKS, dtype=getattr(torch, config.dtype))
        for run, state in zip(runs, states, strict=True)
    )
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)
    arrays = [state.layers[0].arrays() for state in states]
    for name in ("keys", "values", "positions"):
        assert torch.equal(arrays[0][name], arrays[1][name]), name
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0].keys() & {"scores", "H", "z"}:
        torch.testing.assert_close(arrays[1][name], arrays[0][name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["hadamard", "calibrated"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2)])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 11, "rank": 0}], ids=["even", "odd"])
@pytest.mark.usefixtures("compiler")
def test_the_uncompiled_formula_is_torchs_step(bits, kind, changes):
    with torch.compiler.set_stance("force_eager"):
        compare(coded_config(bits=bits, kind=kind, **changes))


@pytest.mark.usefixtures("compiler")
def test_soft_caps_and_pools_of_rows():
    with torch.compiler.set_stance("force_eager"):
        compare(coded_config(softcap=5.0))
        config = coded_config()
        spec = config.layer(0)
        pools = [lc.empty_arrays(spec, 4) for _ in range(2)]
        maps = manager(config, "torch").maps[0]
        plans = [lc.plan_step(spec, maps, backend=name) for name in ("torch", "inductor")]
        lengths, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 1])
        for index in range(25):
            new = some_tokens(config, 2, 1, index)
            outs = [
                lc.step(plan, pool, *new, lengths=lengths, rows=rows)
                for plan, pool in zip(plans, pools, strict=True)
            ]
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-9)
            lengths += 1
        assert torch.equal(pools[0].keys, pools[1].keys)


@pytest.mark.usefixtures("compiler")
def test_layers_that_have_no_codes_are_torchs():
    config = coded_config().replace(
        num_layers=2, capacity=7, rank=[2, 0], quantization=[None, lc.Quantization(3, 3)]
    )
    outs = []
    for name in ("torch", "inductor"):
        run = lc.CacheManager(config, random_maps(config), backend=name)
        state = run.init(2)
        draws = [some_tokens(config, 2, count, count) for count in CHUNKS]
        with torch.compiler.set_stance("force_eager"):
            outs.append([run.attend(state, i, *new) for new in draws for i in range(2)])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("compiler")
def test_compiled_steps_are_torchs():
    with torch.inference_mode():
        compare(coded_config(bits=(3, 2), kind="calibrated", dtype="float32"), rtol=2e-5)


def test_pairs_stored_as_they_are_are_refused():
    config = coded_config(quantization=None)
    with pytest.raises(ValueError, match=r"^backend: got 'inductor', .* quantization is None"):
        lc.CacheManager(config, manager(coded_config(), "torch").maps, backend="inductor")


def test_without_a_compiler_it_is_refused_when_it_is_chosen():
    inductor._check_compiler.cache_clear()
    try:
        with (
            torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
            pytest.raises(ValueError, match=r"^backend: got 'inductor', which needs a C"),
        ):
            manager(coded_config(), "inductor")
    finally:
        inductor._check_compiler.cache_clear()


@pytest.mark.usefixtures("compiler")
def test_it_takes_no_numpy_arrays():
    with pytest.raises(ValueError, match="inductor"):
        manager(coded_config(), "inductor").init(1, dtype=np.float64)
