"""What the conformance tests need to know of a backend."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from conformance.weights import Case, Weight
from cuda import bounds as cuda_bounds
from exllama_ops import backends
from exllama_ops.testing.errors import Error, cpu_dx_error, cpu_gemm_error, reference_error
from triton_backend import bounds as triton_bounds

T = TypeVar("T")

# The instruction sets of the native CPU library, best first; tests/backends compares the list with the library's.
CPU_ISAS = ("amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar")


@dataclass(frozen=True)
class BackendUnderTest:
    """Where the five functions of a backend are found, on which device, and what error its sums declare.

    precision is that of the native CPU backend, None for any other.
    """

    name: str
    ops: Any
    device: str
    precision: str | None = None

    @property
    def served_by(self) -> set[str]:
        """The names of the backends that serve the ops."""
        if self.ops is not torch.ops.exllama:
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

    def gemm_error(self, x: Tensor, weight: Weight) -> Error:
        """Of ``x @ W``."""
        if self.served_by == {"triton"}:
            return Error(triton_bounds.gemm_error(x, weight, truncates=self.device != "cpu"))
        if self.served_by == {"cuda"}:
            algorithms = ("scalar", "tiled") if x.dtype == torch.float32 else ("scalar", "mma", "tiled", "dense")
            return Error(max(cuda_bounds.gemm_error(algorithm, weight, x.dtype) for algorithm in algorithms))
        if self.precision is not None:
            by_row = weight.case.order == "raw"
            return cpu_gemm_error(self.precision, x, weight.dense, weight.groups, by_row=by_row)
        assert self.served_by == {"reference"}, f"no declared error for {self.served_by}"
        return reference_error(x.shape[1])

    def dx_error(self, N: int) -> Error:
        """Of ``grad @ W.T``, whose sums run over N, in float32 at any precision."""
        if self.served_by == {"triton"}:
            return Error(triton_bounds.dx_error(N))
        if self.served_by == {"cuda"}:
            return Error(cuda_bounds.dx_error(N))
        if self.precision is not None:
            return cpu_dx_error(N)
        assert self.served_by == {"reference"}, f"no declared error for {self.served_by}"
        return reference_error(N)
