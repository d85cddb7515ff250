"""The backends under test. A new backend joins the whole suite by one line in `CASES`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch

import less_cache as lc
from less_cache.layer_maps import FIRST_LAYERS
from less_cache.policies import POLICIES
from tests.helpers import Held, as_numpy, held_by

ALL_POLICIES = tuple(POLICIES)


COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")
"""One of them must be there for PyTorch's Inductor."""

NO_GPU = None if torch.cuda.is_available() else "needs a CUDA GPU"


@dataclass(frozen=True)
class BackendCase:
    """One backend, on one device, in one dtype, with what it can do and how exact it is.

    Parameters
    ----------
    name
        The test's id.
    backend
        As `CacheManager` takes it.
    dtype
        float64, float32, float16 or bfloat16.
    outputs, state
        How far outputs, and scores, H and z, may be off the float64 oracle: absolutely below 1,
        relatively above.
    device
        Of torch arrays.
    numpy
        NumPy arrays instead of torch tensors.
    custom_policies
        Whether it runs a user's own policy class.
    vectorised_policies
        Whether it runs one that is vectorised.
    policies, kinds, head_dims, max_rank, max_group, softcap
        What the backend takes; the drawn cases keep to it.
    examples
        How many drawn cases a test of many runs: fewer for a slow backend.
    skip
        Why this machine cannot run it, if so.
    """

    name: str
    backend: str
    dtype: str
    outputs: float
    state: float
    device: str = "cpu"
    numpy: bool = False
    custom_policies: bool = False
    vectorised_policies: bool = False
    policies: tuple[str, ...] = ALL_POLICIES
    kinds: tuple[str, ...] = ("paper", "exp")
    head_dims: tuple[int, ...] = (4, 8)
    max_rank: int = 4
    max_group: int = 4
    softcap: bool = True
    examples: int = 60
    skip: str | None = None

    @property
    def interpreted(self) -> bool:
        """Whether its kernels run under Triton's interpreter, fifty times slower than others."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def exact(self) -> bool:
        """Whether it calculates in float64, so that even close calls fall alike."""
        return self.dtype == "float64"

    @property
    def wide(self) -> bool:
        """Whether its arrays are float32 or wider."""
        return self.dtype in ("float32", "float64")

    def array(self, array: np.ndarray | None) -> Any:
        """A NumPy array as this backend takes it: numbers in its dtype, masks as they are."""
        if array is None:
            return None
        if self.numpy:
            return array.astype(self.dtype) if array.dtype.kind == "f" else array
        tensor = torch.as_tensor(array, device=self.device)
        return tensor.to(getattr(torch, self.dtype)) if array.dtype.kind == "f" else tensor

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """The array as this case's dtype has it, in float64: what the oracle is to be given."""
        return torch.as_tensor(array).to(getattr(torch, self.dtype)).double().numpy()

    def rounded_maps(self, maps: lc.FeatureMaps | None) -> lc.FeatureMaps | None:
        """The maps with the matrices that a backend may read in its dtype rounded to it."""
        if maps is None or self.wide:
            return maps
        dtype = getattr(torch, self.dtype)
        return lc.FeatureMaps.from_tensors(
            [
                layer
                and {
                    name: tensor.to(dtype).float() if name in FIRST_LAYERS else tensor
                    for name, tensor in layer.tensors.items()
                }
                for layer in maps
            ]
        )


def _torch(name: str, dtype: str, outputs: float, state: float, **more: Any) -> BackendCase:
    return BackendCase(name, "torch", dtype, outputs, state, vectorised_policies=True, **more)


CASES = (
    BackendCase(
        "reference-numpy-float64",
        "reference",
        "float64",
        1e-12,
        1e-12,
        numpy=True,
        custom_policies=True,
        vectorised_policies=True,
        examples=15,
    ),
    BackendCase(
        "reference-torch-float32",
        "reference",
        "float32",
        2e-5,
        5e-5,
        custom_policies=True,
        vectorised_policies=True,
        examples=20,
    ),
    _torch("torch-float64", "float64", 1e-9, 1e-9, examples=100),
    _torch("torch-float32", "float32", 2e-5, 5e-5, examples=100),
    _torch("torch-float16", "float16", 1e-2, 1e-2),
    _torch("torch-bfloat16", "bfloat16", 6e-2, 6e-2),
    _torch("torch-cuda", "float32", 2e-5, 5e-5, device="cuda", skip=NO_GPU),
    # Without a GPU the kernels run under Triton's interpreter (see tests/conftest.py), slowly.
    BackendCase(
        "triton-float32",
        "triton",
        "float32",
        2e-5,
        5e-5,
        device="cpu" if NO_GPU else "cuda",
        max_group=2 if NO_GPU else 4,
        examples=4 if NO_GPU else 250,
        skip=None if find_spec("triton") else "needs the package triton",
    ),
)

CODED_CASES = (
    *CASES,
    BackendCase(
        "inductor-float32",
        "inductor",
        "float32",
        2e-5,
        5e-5,
        skip=None if any(map(which, COMPILERS)) else "needs a C++ compiler",
    ),
)
"""With backends that run nothing else."""

ORACLE = BackendCase("oracle", "reference", "float64", 0.0, 0.0, numpy=True)


def each_case(
    wanted: Callable[[BackendCase], bool] = lambda case: True,
    cases: tuple[BackendCase, ...] = CASES,
) -> pytest.MarkDecorator:
    """Parametrise a test over those of `cases` that are `wanted`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=case.name,
                marks=marks_of(case),
            )
            for case in cases
            if wanted(case)
        ],
    )


def marks_of(case: BackendCase) -> list[pytest.MarkDecorator]:
    """What pytest has to know of a case."""
    return [
        *([pytest.mark.gpu] if case.device.startswith("cuda") else []),
        *([pytest.mark.skip(reason=case.skip)] if case.skip else []),
    ]


class Runner:
    """A manager with a state, spoken to in float64 NumPy whatever its backend takes."""

    def __init__(
        self,
        case: BackendCase,
        config: lc.CacheConfig,
        maps: lc.FeatureMaps | None,
        batch: int,
        transforms: lc.Transforms | None = None,
    ) -> None:
        self.case = case
        self.manager = lc.CacheManager(config, maps, backend=case.backend, transforms=transforms)
        dtype = np.dtype(case.dtype) if case.numpy else getattr(torch, case.dtype)
        device = None if case.numpy else case.device
        self.state = self.manager.init(batch, device=device, dtype=dtype)

    def attend(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        layer: int = 0,
    ) -> np.ndarray:
        given = [self.case.array(array) for array in (q, k, v, mask)]
        return as_numpy(self.manager.attend(self.state, layer, *given))

    def held(self, layer: int = 0) -> Held:
        return held_by(self.state.layers[layer], self.state.config.layer(layer))
