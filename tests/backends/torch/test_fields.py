"""Codes as fields to multiply with: the same numbers and bytes as `codes` has."""

import pytest
import torch

from less_cache.backends.torch.fields import fields_of
from less_cache.quantization import code_layout, codes

LAYOUTS = (
    ("hadamard", 2, 11),
    ("hadamard", 3, 16),
    ("hadamard", 8, 12),
    ("calibrated", 2, 16),
    ("calibrated", (8, 6, 4, 3, 2, 1, 1, 0), 64),
    ("calibrated", (6, 4, 4, 3, 3, 2, 2, 0), 20),
)


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
def test_fields_encode_and_read_as_codes_do(spec):
    layout = code_layout(*spec)
    fields = fields_of(layout, torch.float32, torch.device("cpu"))
    u = 3 * torch.randn(2, 3, 5, spec[2], generator=torch.Generator().manual_seed(1))
    u[0, 0, 0] = 0
    packed, scales = codes.encode(layout, u)
    found = fields.encode(u)
    assert torch.equal(found[0], packed)
    assert torch.equal(found[1], scales)
    wanted = codes.decode(layout, packed, scales, torch.float32)
    assert torch.equal(fields.decode(packed, scales), wanted)
    read = (fields.matrix @ fields.rows(packed)).transpose(2, 3)
    assert torch.equal(read * scales.float().unsqueeze(3), wanted)
