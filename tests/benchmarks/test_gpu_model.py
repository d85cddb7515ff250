"""The model of a kernel's time: published times come out, and what should cost time does."""

import dataclasses
import math

import pytest

from benchmarks import gpu_model
from benchmarks.gpu_model import CARDS, Kernel, Loop, Step
from less_cache.backends.triton import plans
from less_cache.backends.triton.aot.on_meta import meta_maps, meta_step
from less_cache.backends.triton.launch import recording
from less_cache.backends.triton.tiles import tiles
from tests.backends.triton.oracle import config

H200 = CARDS["H200"]


def test_published_times_come_out_with_the_error_that_the_docs_tell():
    attention = [abs(row[3]) for row in gpu_model.errors()]
    decoding = [abs(row[5]) for row in gpu_model.errors()]
    assert len(attention) == len(gpu_model.PUBLISHED) == 10
    assert max(attention) < 0.14
    assert max(decoding) < 0.18
    assert sum(attention) / 10 < 0.05
    assert sum(decoding) / 10 < 0.09


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("capacity", [205, 819, 8192])
def test_it_shares_heads_out_as_the_library_does(batch, capacity):
    layer = config(kv_heads=8, group=4, head_dim=128, capacity=capacity, dtype="float16").layer(0)
    tile = tiles(layer, batch, H200.multiprocessors)
    kernels = Step(batch, 8, 4, capacity, 8).kernels(H200)
    assert kernels["attend"].programs == batch * 8 * tile.splits
    assert kernels["attend"].warps == tile.warps
    assert ("conclude_split" in kernels) == (tile.splits > 1)
    turns = kernels["attend"].loops[1].turns
    assert turns == math.ceil(math.ceil(capacity / tile.slots) / tile.splits)
    with recording() as launches:
        maps = meta_maps(layer, "exp", 512)
        meta_step(layer, batch, maps, masked=False, splits=tile.splits)
    names = [one.kernel.__name__ for one in launches]
    assert ["select_and_map" if name in gpu_model.FIRST else name for name in kernels] == names
    for kernel, one in zip(kernels.values(), launches, strict=True):
        assert (kernel.programs, kernel.warps) == (math.prod(one.grid), one.warps)


def test_what_costs_time_costs_time():
    kernel = Kernel(528, 4, 4, (Loop(7, 300, 1, 2),), 1e8)
    spent = kernel.seconds(H200)
    loop = kernel.loops[0]
    waiting = dataclasses.replace(kernel, loops=(dataclasses.replace(loop, under_way=0),) * 20)
    for dearer in (
        dataclasses.replace(kernel, bytes=2e8),
        waiting,
        dataclasses.replace(kernel, programs=5280, loops=(dataclasses.replace(loop, turns=70),)),
    ):
        assert dearer.seconds(H200) > spent
    assert kernel.seconds(CARDS["A100-80GB"]) > spent


def test_no_step_is_faster_than_its_bytes_and_all_are_faster_than_before():
    for card in CARDS.values():
        for batch, capacity in ((1, 205), (16, 819), (64, 205), (64, 8192)):
            step = Step(batch, 8, 4, capacity, 8)
            assert step.bytes / card.bandwidth < step.seconds(card)
            assert step.seconds(card) < dataclasses.replace(step, before=True).seconds(card)
            assert dataclasses.replace(step, rank=0).seconds(card) < step.seconds(card)


def test_many_slots_are_looked_through_in_less_time_apart():
    for card in CARDS.values():
        for line in gpu_model.scans(card)[2:]:
            capacity, together, built, known = map(float, line.split(" | ")[2:6])
            assert known < built
            assert (built == together) == (capacity <= plans.MOST_SCANNED)
            assert built < together or capacity < 8192
