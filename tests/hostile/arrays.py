"""Ways to spoil a tensor or an array, and ways to hand in the same numbers in another form."""

import numpy as np
import torch


def quantised(x):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def compressed(x):
    flat = x.reshape(-1, x.shape[-1])
    return flat.to_sparse_csr()


REFUSED = {
    "none": lambda x: None,
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "masked": lambda x: np.ma.masked_array(x.numpy()),
    "number": lambda x: 1,
    "text": lambda x: "x",
    "nested": lambda x: torch.nested.nested_tensor(list(x.unbind(0))),
    "jagged": lambda x: torch.nested.nested_tensor([x.flatten(), x.flatten()], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "compressed": compressed,
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "quantised": quantised,
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.cfloat().conj(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "half": lambda x: x.half(),
    "fewer-dims": lambda x: x[0],
    "more-dims": lambda x: x[None],
    "another-batch": lambda x: torch.cat([x, x]),
    "nothing": lambda x: x[:0],
    "longer": lambda x: torch.cat([x, x], -1),
}
"""By name: what makes of a good tensor one that must not be taken."""

TAKEN = {
    "expanded": lambda x: x.contiguous().expand(x.shape),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "part": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every-second": lambda x: torch.repeat_interleave(x, 2, 0)[::2],
    "subclass": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    "negative-view": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
    "flipped": lambda x: x.flip(-1).flip(-1),
}
"""By name: what leaves a tensor's numbers as they are."""

MASKS = {
    "uint16": lambda x: x.to(torch.uint16),
    "uint8": lambda x: x.to(torch.uint8),
    "int64": lambda x: x.long(),
    "expanded": TAKEN["expanded"],
    "transposed": TAKEN["transposed"],
    "every-second": TAKEN["every-second"],
}

NUMPY_REFUSED = {
    "none": lambda x: None,
    "list": lambda x: x.tolist(),
    "torch": torch.as_tensor,
    "masked": np.ma.masked_array,
    "matrix": lambda x: np.asmatrix(x.reshape(x.shape[0], -1)),
    "other-bytes": lambda x: x.astype(">f4"),
    "half": lambda x: x.astype(np.float16),
    "object": lambda x: x.astype(object),
    "text": lambda x: x.astype(str),
    "dates": lambda x: x.astype("datetime64[s]"),
    "fields": lambda x: np.zeros(x.shape, [("a", np.float32)]),
    "fewer-dims": lambda x: x[0],
    "another-batch": lambda x: np.concatenate([x, x]),
    "longer": lambda x: np.concatenate([x, x], -1),
}

NUMPY_TAKEN = {
    "reversed-twice": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "negative-strides": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}

ODDITIES = (
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    10**12,
    2**70,
    "",
    "x",
    "5%",
    "-5%",
    "nan%",
    "1e400%",
    b"x",
    [],
    {},
    (),
    [3],
    [None],
    {1, 2},
    range(2),
    1j,
    object(),
    int,
    len,
    np.int64(3),
    np.float32(2.0),
    np.array(3),
    np.array([3, 3]),
    torch.tensor(3),
    torch.tensor([3, 3]),
    torch.float32,
)
"""Things of all kinds, few of which any one argument takes."""
