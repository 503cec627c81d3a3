"""What the conformance tests need to know of a backend."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from conformance.bounds import UNIT_ROUNDOFF_F64, gamma
from conformance.weights import Case, Weight
from cuda import bounds as cuda_bounds
from exllama_ops import backends
from triton_backend import bounds as triton_bounds

T = TypeVar("T")

# The instruction sets of the native CPU library, best first; tests/backends compares the list with the library's.
CPU_ISAS = ("amx", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar")
# Rows of a block, of which activations share a scale, at most; it ends where its group ends.
CPU_BLOCK_ROWS = 128


class Error(NamedTuple):
    """What a backend declares for its sums, before the final rounding: ``relative |x| |W| + absolute``."""

    relative: float
    absolute: Tensor | float = 0.0


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
        if self.precision is None:
            return self._reference_error(x.shape[1])
        blocks = cpu_blocks(weight)
        # Of floats, and of what is added up in float32 in any class: the rows of a block, the blocks, two factors.
        depth = min(CPU_BLOCK_ROWS, x.shape[1]) + len(blocks) + 2
        if self.precision == "highest" or weight.case.order == "raw":  # a raw g_idx has no blocks of one group
            return Error(gamma(depth))
        x, W = x.double(), weight.dense
        if self.precision == "high":
            return Error(0.0, sum(_high_error(x[:, rows], W[rows]) for rows in blocks))
        # int8 with a power of two for a scale, of which half is at most max|x| / 127.
        medium = sum(
            x[:, rows].abs().amax(1, keepdim=True) / 127 * W[rows].abs().sum(0, keepdim=True) for rows in blocks
        )
        return Error(gamma(depth), medium)

    def dx_error(self, N: int) -> Error:
        """Of ``grad @ W.T``, whose sums run over N, in float32 at any precision."""
        if self.served_by == {"triton"}:
            return Error(triton_bounds.dx_error(N))
        if self.served_by == {"cuda"}:
            return Error(cuda_bounds.dx_error(N))
        if self.precision is None:
            return self._reference_error(N)
        return Error(gamma(N + 3))

    def _reference_error(self, depth: int) -> Error:
        assert self.served_by == {"reference"}, f"no declared bound for {self.served_by}"
        # The sum is taken in float64 and rounded to float32.
        return Error(2.0**-24 + gamma(depth, UNIT_ROUNDOFF_F64))


def _high_error(x: Tensor, W: Tensor) -> Tensor:
    """Of one block: by the norms, or by elements and 30 bits of x in the rows of x that have an outlier there."""
    by_norms = x.norm(dim=1, keepdim=True) * W.norm(dim=0, keepdim=True)
    largest = x.abs().amax(1, keepdim=True)
    by_elements = x.abs() @ W.abs() + 2.0**-18 * largest * W.abs().sum(0, keepdim=True)
    return 2.0**-11 * torch.where(largest > 16 * x.abs().mean(1, keepdim=True), by_elements, by_norms)


def cpu_blocks(weight: Weight) -> list[Tensor]:
    """The rows of each block of the native CPU backend, numbered as in the checkpoint."""
    order = weight.groups.argsort(stable=True)
    _, sizes = weight.groups[order].unique_consecutive(return_counts=True)
    return [block for group in order.split(sizes.tolist()) for block in group.split(CPU_BLOCK_ROWS)]
