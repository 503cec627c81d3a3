"""The backends under test: which there are, what they declare, and how a test asks for each of them.

A test that takes the fixture ``backend`` runs once per backend. One of gptq_gemm or gptq_gemm_multi also runs at each
matmul precision of the CPU, by the mark `at_every_precision` or `at_every_precision_of`. Nothing else depends on the
precision: test_axes.py. The CPU's ops run on every instruction set within one test, see `OnEveryIsa`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from conformance.weights import Case, Weight
from cuda import bounds as cuda_bounds
from exllama_ops import backends
from exllama_ops.backends.cpu.library import CpuLibrary
from exllama_ops.testing.errors import Error, cpu_dx_error, cpu_gemm_error, reference_error
from triton_backend import bounds as triton_bounds

T = TypeVar("T")

# The instruction sets of the native CPU library, best first; tests/backends compares the list with the library's.
CPU_ISAS = ("amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "neon_i8mm", "neon_dotprod", "neon", "scalar")
PRECISIONS = ("highest", "high", "medium")

# A run of its own: EXLLAMA_OPS_BACKEND=triton TRITON_INTERPRET=1 python -m pytest tests/conformance
INTERPRETED = backends.serving("gptq_gemm", "CPU") is backends.triton.BACKEND

# What the fixture `backend` is made of: where the ops are found, their device, and the precision of the native CPU.
_REFERENCE = pytest.param(("reference", "cpu", None), id="reference")
_CUDA = pytest.param(("ops", "cuda", None), id="ops-cuda", marks=pytest.mark.gpu)
_TRITON = pytest.param(("ops", "cpu", None), id="triton-interpreted")


def _cpu(precision: str, id: str) -> Any:
    return pytest.param(("ops", "cpu", precision), id=id)


BACKENDS = [_TRITON] if INTERPRETED else [_REFERENCE, _cpu("highest", "ops-cpu"), _CUDA]
BACKENDS_AND_PRECISIONS = (
    [_TRITON] if INTERPRETED else [_REFERENCE, *(_cpu(each, f"ops-cpu-{each}") for each in PRECISIONS), _CUDA]
)

at_every_precision = pytest.mark.parametrize("backend", BACKENDS_AND_PRECISIONS, indirect=True)


def at_every_precision_of(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by ``backend`` and ``case``.

    A raw g_idx is multiplied in floats at any precision, so that it runs at one.
    """
    sets = [
        pytest.param(*backend.values, case, id=f"{backend.id}-{case}", marks=backend.marks)
        for case in cases
        for backend in (BACKENDS if case.order == "raw" else BACKENDS_AND_PRECISIONS)
    ]
    return pytest.mark.parametrize(("backend", "case"), sets, indirect=["backend"])


class OnEveryIsa:
    """torch.ops.exllama by the native CPU library, called on every instruction set that this CPU has.

    All of them must give the bits of the first, or its error, and leave the same bits in the arguments. So what a test
    finds of the first holds for all.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self._library = library
        self.isas = [isa for isa in CPU_ISAS if library.isas().get(isa)]

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, getattr(torch.ops.exllama, name))

    def _call(self, op: Any, *args: Any) -> Any:
        memory = {tensor.untyped_storage().data_ptr(): _bytes(tensor) for tensor in _tensors(args)}.values()
        before = [storage.clone() for storage in memory]
        first: tuple[Any, ...] = ()
        for isa in self.isas:
            for storage, saved in zip(memory, before, strict=True):
                storage.copy_(saved)
            self._library.use_isa(isa)
            try:
                result, error = op(*args), None
            except Exception as raised:
                result, error = None, raised
            after = [storage.clone() for storage in memory]
            if not first:
                first = result, error, after
                continue
            what = f"{op}: {isa} and {self.isas[0]} differ"
            assert (type(error), str(error)) == (type(first[1]), str(first[1])), what
            assert result is first[0] is None or _same_bits(result, first[0]), what
            assert all(map(torch.equal, after, first[2])), f"{what} in their arguments"
        result, error, _ = first
        if error is not None:
            raise error
        return result


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    lists = [arg if isinstance(arg, list | tuple) else [arg] for arg in args]
    return [value for values in lists for value in values if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> Tensor:
    """The whole memory in which a tensor lies."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two results are alike to the bit, but for the bits of NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    words = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return bool(((one.view(words) == other.view(words)) | (one.isnan() & other.isnan())).all())


@dataclass(frozen=True)
class BackendUnderTest:
    """Where the functions of a backend are found, on which device, and what error its sums declare.

    precision is that of the native CPU backend, None for any other.
    """

    name: str
    ops: Any
    device: str
    precision: str | None = None

    @functools.cached_property
    def served_by(self) -> set[str]:
        """The names of the backends that serve the ops."""
        if self.precision is None and self.name.startswith("reference"):
            return {"reference"}
        return {choice.backend.name for choice in backends.report() if choice.dispatch_key.lower() == self.device}

    def thinned(self, products: Sequence[T], case: Case, slow: bool) -> Sequence[T]:
        """All of the products, or a fifth of them, another for each case, where Triton's interpreter computes."""
        if slow or self.device != "cpu" or self.served_by != {"triton"}:
            return products
        return products[zlib.crc32(str(case).encode()) % 5 :: 5]

    @property
    def never_overflows(self) -> bool:
        """Whether nothing overflows before the final rounding, whatever x and the scales are."""
        return self.precision is not None or self.served_by == {"reference"}

    @property
    def flushes_bfloat16(self) -> bool:
        """Whether subnormal bfloat16 numbers are taken for zero: Triton's interpreter converts them so, no device."""
        return self.device == "cpu" and self.served_by == {"triton"}

    @property
    def sums_are_exact(self) -> bool:
        """Whether a product whose terms and sums all fit into float32 comes out exactly."""
        return self.precision in (None, "highest")

    @property
    def parts_have_the_bits_of_gemm(self) -> bool:
        """Whether gptq_gemm_multi divides a part's sums as gptq_gemm does; CUDA divides those of all parts as one."""
        return self.served_by != {"cuda"}

    @property
    def experts_have_the_bits_of_gemm(self) -> bool:
        """Whether gptq_moe_gemm divides the sums of an expert as gptq_gemm does."""
        return self.served_by <= {"cpu", "reference"}

    def gemm_error(self, x: Tensor, weight: Weight, tokens: int | None = None, experts: int = 1) -> Error:
        """The error of ``x @ W``; of gptq_moe_gemm, where x are the rows of one of ``experts`` among ``tokens``."""
        if self.served_by == {"triton"}:
            truncates = self.device != "cpu"
            return Error(triton_bounds.gemm_error(x, weight, truncates=truncates, tokens=tokens, experts=experts))
        if self.served_by == {"cuda"}:
            algorithms = ("scalar", "tiled") if x.dtype == torch.float32 else ("scalar", "mma", "tiled", "dense")
            return Error(max(cuda_bounds.gemm_error(algorithm, weight, x.dtype) for algorithm in algorithms))
        if self.precision is not None:
            by_row = weight.case.order == "raw"
            return cpu_gemm_error(self.precision, x, weight.dense, weight.groups, by_row=by_row)
        assert self.served_by == {"reference"}, f"no declared error for {self.served_by}"
        return reference_error(x.shape[1])

    def dx_error(self, N: int) -> Error:
        """The error of ``grad @ W.T``, whose sums run over N."""
        if self.served_by == {"triton"}:
            return Error(triton_bounds.dx_error(N))
        if self.served_by == {"cuda"}:
            return Error(max(cuda_bounds.dx_error(N, algorithm) for algorithm in ("tiled", "dense")))
        if self.precision is not None:
            return cpu_dx_error(N)
        assert self.served_by == {"reference"}, f"no declared error for {self.served_by}"
        return reference_error(N)
