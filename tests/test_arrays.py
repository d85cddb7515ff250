"""Pages: how a row of a layer lies in one buffer."""

import pytest
import torch

import less_cache as lc
from less_cache.arrays import PAGE_ALIGNMENT, array_shapes
from tests.helpers import POLICIES, policy_id, small_config


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_id)
def test_a_page_holds_every_array_once_and_aligned(policy, rank, dtype):
    config = small_config(policy=policy, rank=rank, dtype=dtype, capacity=[6, [7, 9]], head_dim=5)
    for index in range(config.num_layers):
        page = config.page(index)
        end = 0
        for field in page:
            assert field.offset % PAGE_ALIGNMENT == 0
            assert 0 <= field.offset - end < PAGE_ALIGNMENT
            end = field.offset + field.nbytes
        assert page.nbytes % PAGE_ALIGNMENT == 0
        assert end <= page.nbytes < end + PAGE_ALIGNMENT
        # All that a sequence takes but its length, which the engine has.
        held = sum(field.nbytes for field in page)
        assert held == config.layer(index).bytes_per_sequence - 4
        assert {field.name for field in page} == set(array_shapes(config.layer(index)))


def test_arrays_of_a_buffer_are_views_of_it_that_do_not_overlap():
    config = small_config(policy=lc.Scissorhands(), capacity=[6, [7, 9]])
    page = config.page(1)
    buffer = torch.zeros(4, page.nbytes + 32, dtype=torch.int8)
    arrays = page.arrays(buffer)
    for number, array in enumerate(arrays.named().values(), 1):
        array.fill_(number)
    for number, array in enumerate(arrays.named().values(), 1):
        assert (array == number).all()
    assert not buffer[:, page.nbytes :].any()
    assert arrays.keys.shape == (4, 16, 4)


BUFFERS = {
    "of-floats": (TypeError, lambda n: torch.zeros(2, n)),
    "no-tensor": (TypeError, lambda n: bytes(n)),
    "too-short": (ValueError, lambda n: torch.zeros(2, n - 1, dtype=torch.int8)),
    "one-row": (ValueError, lambda n: torch.zeros(n, dtype=torch.int8)),
    "in-columns": (ValueError, lambda n: torch.zeros(n, 2, dtype=torch.int8).T),
    "rows-askew": (ValueError, lambda n: torch.zeros(2, n + 3, dtype=torch.int8)),
    "begins-askew": (ValueError, lambda n: torch.zeros(2, n + 16, dtype=torch.uint8)[:, 4:]),
}


@pytest.mark.parametrize(("error", "make"), BUFFERS.values(), ids=BUFFERS)
def test_buffers_that_are_no_pages_are_refused(error, make):
    page = small_config().page(0)
    with pytest.raises(error, match=r"^buffer: "):
        page.arrays(make(page.nbytes))
    with pytest.raises(ValueError, match=r"^layer: "):
        small_config().page(2)
