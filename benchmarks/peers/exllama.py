"""Our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

import exllama_ops
from benchmarks.cases import Weight
from benchmarks.peers.peer import Kind, Layer
from exllama_ops.backends.cpu.precision import CpuMatmulPrecision
from exllama_ops.huge_pages import clone_in_huge_pages

# The class of each precision, best first.
PRECISIONS: dict[CpuMatmulPrecision, Kind] = {"highest": "float", "high": "int16", "medium": "int8"}


def gemm(weight: Weight, precision: CpuMatmulPrecision, dtype: torch.dtype = torch.float16) -> Layer:
    """A copy of the weight for gptq_gemm at a precision."""
    arguments = _copied(weight)

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.exllama.gptq_gemm(x, *arguments)
        return out

    return Layer(
        take=lambda x: x.to(dtype),
        run=run,
        give=lambda out: out,
        nbytes=weight.nbytes,
        enter=lambda: exllama_ops.set_cpu_matmul_precision(precision),
    )


def gemm_dx(weight: Weight, dtype: torch.dtype = torch.float16) -> Layer:
    """A copy of the weight for gptq_gemm_dx, whose x is the gradient (M, N)."""
    arguments = _copied(weight)

    def run(grad: Tensor) -> Tensor:
        out: Tensor = torch.ops.exllama.gptq_gemm_dx(grad, *arguments)
        return out

    return Layer(take=lambda grad: grad.to(dtype), run=run, give=lambda out: out, nbytes=weight.nbytes)


def _copied(weight: Weight) -> tuple[object, ...]:
    return weight.op_weight.map(clone_in_huge_pages).arguments
