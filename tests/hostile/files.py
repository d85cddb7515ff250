"""Ways to damage files: bits that flip, ends that are cut off, headers that say something else."""

import json

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors import safe_open

from less_cache._tensor_files import DIGEST, write_tensors


def flipped(whole, place, bit):
    """The bytes with one bit changed; `place` is a share of their number."""
    damaged = bytearray(whole)
    damaged[int(place * (len(whole) - 1))] ^= 1 << bit
    return bytes(damaged)


DAMAGES = st.one_of(
    st.builds(
        lambda place, bit: lambda whole: flipped(whole, place, bit),
        st.floats(0, 1),
        st.integers(0, 7),
    ),
    st.builds(lambda share: lambda whole: whole[: int(share * len(whole))], st.floats(0, 0.9999)),
    st.builds(lambda more: lambda whole: whole + more, st.binary(min_size=1, max_size=9)),
    st.builds(lambda text: lambda whole: text, st.binary(max_size=64)),
    st.builds(
        lambda size: lambda whole: size.to_bytes(8, "little") + whole[8:],
        st.integers(0, 2**64 - 1),
    ),
    st.builds(lambda start: lambda whole: whole[int(start * len(whole)) :], st.floats(0.001, 1)),
)
"""Functions from a file's bytes to others."""


def contents(path):
    """Header and tensors of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sign(path, header, tensors):
    """Write a file with a right digest, whatever it says."""
    header = {name: text for name, text in header.items() if name != DIGEST}
    write_tensors(path, tensors, header)


NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e30, 3.0, -2.0, 99.0)


def poked(tensor, rng):
    """The tensor with one number changed to one that may be impossible."""
    changed = tensor.clone()
    if not changed.numel():
        return changed
    value = NUMBERS[rng.integers(len(NUMBERS))]
    if not changed.is_floating_point():
        # A length near 2**31 is a matter of its own.
        value = int(np.clip(np.nan_to_num(value, nan=-3), -1000, 1000))
    changed.view(-1)[rng.integers(changed.numel())] = value
    return changed


TENSOR_WAYS = {
    "poked": poked,
    "wider": lambda x, rng: x.double() if x.dtype != torch.float64 else x.float(),
    "longer": lambda x, rng: torch.cat([x, x]),
    "cut": lambda x, rng: x[..., :-1].contiguous(),
    "flat": lambda x, rng: x.flatten(),
    "nothing": lambda x, rng: x[:0].clone(),
    "shuffled": lambda x, rng: x.flatten()[torch.as_tensor(rng.permutation(x.numel()))].view_as(x),
}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1.5, 10**8, 2**70, "", "x", [], {}, [3], ["a"], {"a": 1}]),
    st.integers(-3, 9),
    st.floats(),
)
"""JSON of all kinds."""


def places(data, prefix=()):
    """All paths into JSON data."""
    found = [prefix] if prefix else []
    if isinstance(data, (dict, list)):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in items:
            found += places(value, (*prefix, key))
    return found


def changed_at(data, path, value, *, remove=False):
    """A copy of JSON data with the value at a path replaced or removed."""
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy
