"""The bases in which pairs are coded: linear at the edges of a step, codes and scales inside.

A key k and a value v of one KV head enter as ``(k - m) A`` and ``(v - m') A'``. A query enters so
that products stay what they were, ``q B^T`` with B = A^-1, and ``q·m`` is added to them; an output
leaves by ``o B' + m'``. The low-rank state H lives in the values' inner basis. Feature maps are
folded: φ and ψ take inner queries and keys and give what they gave.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._tensor_files import digest_of, read_tensors, write_tensors
from ..layer_config import LayerConfig
from ..layer_maps import LayerMaps

FORMAT = "less_cache.transforms.1"
FILE = "transforms.safetensors"
"""What a file of bases is called in a folder."""
TENSORS = ("key_in", "key_out", "key_mean", "value_in", "value_out", "value_mean")
INVERSES = {"key_in": "key_out", "value_in": "value_out"}


@dataclass(frozen=True)
class LayerTransforms:
    """One layer's bases.

    Parameters
    ----------
    key_in, key_out
        [Hkv, D, D], A and B = A^-1 of the keys. The inner channels are sorted: those that matter
        most come first. Steps of their codes are 1 for a pair of ordinary size.
    key_mean
        [Hkv, D], m; ``None``: zero.
    value_in, value_out, value_mean
        Likewise of the values.
    """

    key_in: Tensor
    key_out: Tensor
    key_mean: Tensor | None
    value_in: Tensor
    value_out: Tensor
    value_mean: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors by name, means only where there are some."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> LayerTransforms:
        """The same elsewhere."""
        changed = {name: tensor.to(device, dtype) for name, tensor in self.named().items()}
        return dataclasses.replace(self, **changed)

    def heads(self, kv_heads: slice) -> LayerTransforms:
        """Those of some KV heads."""
        return dataclasses.replace(self, **{n: t[kv_heads] for n, t in self.named().items()})

    def enter(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values in the inner basis, and what is added to the queries' products.

        Parameters
        ----------
        q
            [B, Hq, S, D].
        k, v
            [B, Hkv, S, D].

        Returns
        -------
        q, k, v
            In the transforms' dtype.
        shift
            [B, Hq, S], q·m; ``None`` where the keys have no mean.
        """
        q, k, v = (array.to(self.key_in.dtype) for array in (q, k, v))
        shift = None
        if self.key_mean is not None:
            shift = _by_head(q, self.key_mean.unsqueeze(2)).squeeze(3)
        inner_q = _by_head(q, self.key_out.transpose(1, 2))
        return inner_q, self.enter_keys(k), self.enter_values(v), shift

    def enter_keys(self, k: Tensor) -> Tensor:
        """Keys [B, Hkv, S, D] in the inner basis."""
        centred = k if self.key_mean is None else k - self.key_mean.unsqueeze(1)
        return _by_head(centred, self.key_in)

    def enter_values(self, v: Tensor) -> Tensor:
        """Values [B, Hkv, S, D] in the inner basis."""
        centred = v if self.value_mean is None else v - self.value_mean.unsqueeze(1)
        return _by_head(centred, self.value_in)

    def leave_keys(self, k: Tensor) -> Tensor:
        """Keys [B, Hkv, S, D] as they were before `enter_keys`."""
        k = _by_head(k, self.key_out)
        return k if self.key_mean is None else k + self.key_mean.unsqueeze(1)

    def leave(self, out: Tensor) -> Tensor:
        """Outputs or values [B, Hq or Hkv, S, D] as they were before `enter_values`."""
        out = _by_head(out, self.value_out)
        if self.value_mean is None:
            return out
        group = out.shape[1] // len(self.value_mean)
        return out + self.value_mean.repeat_interleave(group, 0).unsqueeze(1)

    def fold(self, maps: LayerMaps) -> LayerMaps:
        """Feature maps that take inner queries and keys and give what `maps` give of outer ones.

        With q = q' A^T and k = k' B + m, the first layers become A^T W1 and B V1; m V1 is added.
        """
        tensors = dict(maps.tensors)
        group = len(tensors["phi_w1"]) // len(self.key_in)
        spread = self.key_in.repeat_interleave(group, 0)
        wide = tensors["phi_w1"].dtype
        tensors["phi_w1"] = spread.transpose(1, 2).to(wide) @ tensors["phi_w1"]
        outer = tensors["psi_w1"]
        tensors["psi_w1"] = self.key_out.to(wide) @ outer
        if self.key_mean is not None:
            tensors["psi_b1"] = (self.key_mean.to(wide).unsqueeze(1) @ outer).squeeze(1)
        return LayerMaps(maps.kind, tensors)


class Transforms(Sequence["LayerTransforms | None"]):
    """The bases of all layers of a model.

    Parameters
    ----------
    kind
        As of `Quantization.transform`.
    layers
        One a layer; ``None`` where pairs are stored as they are, or in the Hadamard basis.
    key_bits, value_bits
        That they were fitted for; 0: any. One for all, or one a layer.

    Attributes
    ----------
    The parameters, `key_bits` and `value_bits` one for all where all layers that have bases agree,
    else one a layer, 0 where there are none.

    Raises
    ------
    ValueError
        If no layer has bases, or there are bits of more or fewer layers.
    """

    def __init__(
        self,
        kind: str,
        layers: Sequence[LayerTransforms | None],
        *,
        key_bits: int | Sequence[int] = 0,
        value_bits: int | Sequence[int] = 0,
    ) -> None:
        self.kind = kind
        self.layers = tuple(layers)
        if all(layer is None for layer in self.layers):
            raise ValueError("layers: got none, expected the bases of at least one layer")
        self.key_bits = self._bits("key_bits", key_bits)
        self.value_bits = self._bits("value_bits", value_bits)

    def _bits(self, name: str, bits: int | Sequence[int]) -> int | tuple[int, ...]:
        if isinstance(bits, int):
            return bits
        if len(bits) != len(self):
            raise ValueError(f"{name}: got {len(bits)} entries, expected one, or {len(self)}")
        held = [b for b, layer in zip(bits, self.layers, strict=True) if layer is not None]
        if len(set(held)) == 1:
            return held[0]
        return tuple(0 if own is None else b for b, own in zip(bits, self.layers, strict=True))

    def bits_of(self, layer: int) -> tuple[int, int]:
        """Of keys and of values, that a layer's bases are for; 0: any, or there are none."""
        key, value = (
            0 if self.layers[layer] is None else bits if isinstance(bits, int) else bits[layer]
            for bits in (self.key_bits, self.value_bits)
        )
        return key, value

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[LayerTransforms | None]:
        return iter(self.layers)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything in them but what is worked out, which machines differ in."""
        wide = {name: tensor.to(torch.float64) for name, tensor in self._tensors().items()}
        return digest_of(wide, self._header())

    def check_against(self, config: Any) -> None:
        """Refuse transforms that are not for such a `CacheConfig`.

        Raises
        ------
        ValueError
            That says what differs.
        """
        if not config.has_codes:
            raise ValueError("transforms: given, but config.quantization is None")
        kinds = {codes.transform for codes in config.quantizations if codes is not None}
        shape = (config.kv_heads, config.head_dim, config.head_dim)
        first = next(own for own in self.layers if own is not None)
        found = (self.kind, len(self), tuple(first.key_in.shape))
        # "calibrated" where some layer's are: it comes first.
        expected = (min(kinds), config.num_layers, shape)
        if found != expected:
            raise ValueError(
                "transforms: got (kind, layers, shape of key_in) = "
                f"{found}, but the config needs {expected}"
            )
        for i, (own, wanted) in enumerate(zip(self.layers, config.quantizations, strict=True)):
            if (own is not None) != (wanted is not None and wanted.transform == self.kind):
                raise ValueError(
                    f"transforms: {'none' if own is None else 'some'} for layer {i}, whose "
                    f"quantization is {wanted}"
                )
            bits = self.bits_of(i)
            if any(bits) and bits != (wanted.key_bits, wanted.value_bits):
                raise ValueError(
                    f"transforms: fitted for {bits} bits of keys and values in layer {i}, but the "
                    f"config has {(wanted.key_bits, wanted.value_bits)}"
                )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, by way of a temporary name."""
        write_tensors(Path(path), self._tensors(), self._header())

    @classmethod
    def load(cls, path: str | Path) -> Transforms:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is damaged, or holds no transforms.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of transforms")
        header, tensors = read_tensors(path)
        return cls.from_parts(str(path), tensors, header)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a file holds of them: tensors by name, and a header."""
        return self._tensors(), self._header()

    @classmethod
    def from_parts(
        cls, where: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
    ) -> Transforms:
        """The transforms that `to_parts` took apart; `where` begins the messages of errors.

        Raises
        ------
        ValueError
            If tensors and header disagree.
        """
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{where}: no transforms: format {header.get('format')!r}, expected {FORMAT!r}"
            )
        try:
            count = int(header["layers"])
            bits = {name: _read_bits(header[name]) for name in ("key_bits", "value_bits")}
            without = set(json.loads(header.get("without", "[]")))
            layers = [
                None if i in without else _read_layer(tensors, f"layers.{i}.") for i in range(count)
            ]
            found = cls(header["kind"], layers, **bits)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: damaged: {error}") from None
        wanted = {f"layers.{i}.{name}" for i in {*range(count)} - without for name in TENSORS}
        if not tensors.keys() <= wanted:
            raise ValueError(f"{where}: holds tensors of other layers than its {count}")
        return found

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            if layer is not None
            for name, tensor in _stored(layer).items()
        }

    def _header(self) -> dict[str, str]:
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "layers": str(len(self)),
            "key_bits": _bits_text(self.key_bits),
            "value_bits": _bits_text(self.value_bits),
        }
        if without := [i for i, layer in enumerate(self.layers) if layer is None]:
            header["without"] = json.dumps(without)
        return header


def check_transforms(config: Any, transforms: Transforms | None) -> None:
    """Refuse transforms that do not go with a `CacheConfig`, or that it lacks.

    Raises
    ------
    ValueError, TypeError
        That says what is wrong.
    """
    if transforms is not None:
        if not isinstance(transforms, Transforms):
            raise TypeError(f"transforms: got {type(transforms).__name__}, expected Transforms")
        transforms.check_against(config)
    for codes in config.quantizations:
        if codes is not None and codes.transform == "calibrated" and transforms is None:
            raise ValueError(f"transforms: got None, but {codes} needs calibrated ones")


def layer_transforms(layer: LayerConfig, given: LayerTransforms | None) -> LayerTransforms | None:
    """The bases of a layer's codes.

    Raises
    ------
    ValueError, TypeError
        If those given do not go with the layer, or some are needed.
    """
    if given is not None and not isinstance(given, LayerTransforms):
        raise TypeError(f"transforms: got {type(given).__name__}, expected Transforms[i]")
    if layer.quantization is None:
        if given is not None:
            raise ValueError("transforms: given, but the layer's pairs are stored as they are")
        return None
    if layer.quantization.transform == "hadamard":
        if given is not None:
            raise ValueError("transforms: given, but the layer's is the fixed Hadamard rotation")
        return hadamard_transforms(layer.kv_heads, layer.head_dim)
    if given is None:
        raise ValueError(f"transforms: got None, but {layer.quantization} needs calibrated ones")
    shape = (layer.kv_heads, layer.head_dim, layer.head_dim)
    if tuple(given.key_in.shape) != shape:
        raise ValueError(f"transforms: of shape {tuple(given.key_in.shape)}, expected {shape}")
    if given.key_mean is not None and layer.softcap is not None:
        raise ValueError("transforms: with a mean of keys, which a soft cap does not allow")
    return given


@functools.cache
def hadamard_transforms(kv_heads: int, head_dim: int) -> LayerTransforms:
    """The fixed rotation, the same for every head of every layer."""
    matrix = hadamard_matrix(head_dim).expand(kv_heads, -1, -1)
    inverse = matrix.transpose(1, 2)
    return LayerTransforms(matrix, inverse, None, matrix, inverse, None)


def hadamard_matrix(size: int) -> Tensor:
    """An orthogonal matrix [size, size], float64, that spreads every channel over all others.

    A Hadamard matrix with random signs; where the size is 2^a m with m odd, the Kronecker product
    of that of 2^a with the discrete cosine transform of m.
    """
    power = size & -size
    odd = size // power
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    n = torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi / odd * (n + 0.5) * n.unsqueeze(1)) * math.sqrt(2 / odd)
    cosines[0] = math.sqrt(1 / odd)
    matrix = torch.kron(matrix / math.sqrt(power), cosines)
    return _signs(size).unsqueeze(1) * matrix


def _signs(size: int) -> Tensor:
    """1 and -1, [size], the same everywhere and forever."""
    bits: list[int] = []
    block = 0
    while len(bits) < size:
        digest = hashlib.sha256(f"less_cache {block}".encode()).digest()
        bits += [byte >> shift & 1 for byte in digest for shift in range(8)]
        block += 1
    return torch.tensor([1.0 - 2.0 * bit for bit in bits[:size]], dtype=torch.float64)


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """``x[:, h] @ matrix[h // G]`` of [B, Hq, S, D] and [Hkv, D, E]: [B, Hq, S, E]."""
    batch, heads, tokens, size = x.shape
    kv_heads = len(matrix)
    if batch == 1 or tokens > size:
        grouped = x.reshape(batch, kv_heads, -1, size) @ matrix
        return grouped.view(batch, heads, tokens, -1)
    # One product a head for the whole batch: `@` would copy the matrices for each sequence.
    rows = x.unflatten(1, (kv_heads, -1)).transpose(0, 1)
    found = torch.bmm(rows.reshape(kv_heads, -1, size), matrix)
    return found.unflatten(1, (batch, -1)).transpose(0, 1).reshape(batch, heads, tokens, -1)


def _bits_text(bits: int | tuple[int, ...]) -> str:
    return str(bits) if isinstance(bits, int) else json.dumps(bits)


def _read_bits(text: str) -> int | list[int]:
    bits = json.loads(text)
    entries = bits if isinstance(bits, list) else [bits]
    if not all(type(entry) is int for entry in entries):
        raise ValueError(f"bits: {text!r:.80}")
    return bits  # type: ignore[no-any-return]


def _stored(layer: LayerTransforms) -> dict[str, Tensor]:
    """What a file holds of a layer: not what can be worked out, and nothing wider than it needs."""
    found = layer.named()
    for entry, leave in INVERSES.items():
        if torch.equal(found[leave], inverse(found[entry])):
            del found[leave]
    return {name: _narrow(tensor) for name, tensor in found.items()}


def inverse(matrix: Tensor) -> Tensor:
    """The inverses of matrices [Hkv, D, D], worked out in float64."""
    return torch.linalg.inv(matrix.to("cpu", torch.float64)).to(matrix)


def _narrow(tensor: Tensor) -> Tensor:
    for dtype in (torch.float16, torch.float32):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def _read_layer(tensors: Mapping[str, Tensor], prefix: str) -> LayerTransforms:
    found: dict[str, Tensor | None] = {}
    for name in TENSORS:
        tensor = tensors.get(prefix + name)
        found[name] = None if tensor is None else tensor.to(torch.float64)
    for entry, leave in INVERSES.items():
        matrix = found[entry]
        if matrix is None:
            raise KeyError(prefix + entry)
        if found[leave] is None:
            try:
                found[leave] = inverse(matrix)
            except RuntimeError:
                raise ValueError(f"{prefix}{entry} has no inverse") from None
    held: dict[str, Any] = found
    return LayerTransforms(**held)
