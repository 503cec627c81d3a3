"""The gate for our kernels on a GPU: what each algorithm declares, asked for by the weights of `benchmarks.cases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cases import Weight
from benchmarks.conformance import Gate
from benchmarks.peers.exllama_cuda import ALGORITHMS, AUTO
from exllama_ops.backends.batch_invariant import is_batch_invariant
from exllama_ops.backends.triton import tiles
from exllama_ops.testing.errors import Error, cuda_dx_error, cuda_gemm_error, triton_gemm_error

TRITON = "triton"
DX_ALGORITHMS = ("tiled", "dense")  # of gptq_gemm_dx


def cuda_gate(
    weight: Weight, x: Tensor, grad: Tensor | None, tokens: Sequence[int], triton_device: tiles.Device
) -> Gate:
    """The gate for every algorithm of the native library, for its own choice, and for Triton.

    Args:
        weight: on the host.
        x: as `Gate` takes it.
        grad: likewise.
        tokens: numbers of rows of x that will be timed, by which Triton chooses its form.
        triton_device: what it knows of the GPU.
    """

    def errors(weight: Weight, x: Tensor, W: Tensor) -> Iterator[tuple[str, Error]]:
        able = ("scalar", "tiled") if x.dtype == torch.float32 else ALGORITHMS
        declared = {algorithm: native_error(algorithm, weight, x.dtype) for algorithm in able}
        declared[AUTO] = max(declared.values())
        declared[TRITON] = max(triton_error(weight, x.dtype, M, triton_device) for M in tokens)
        for name, relative in declared.items():
            yield name, Error(relative)

    return Gate(
        weight,
        x,
        grad,
        errors=errors,
        dx_error=lambda N: max(cuda_dx_error(algorithm, N) for algorithm in DX_ALGORITHMS),
    )


def native_error(algorithm: str, weight: Weight, dtype: torch.dtype) -> float:
    """The relative error of gptq_gemm by an algorithm."""
    return cuda_gemm_error(algorithm, dtype, K=weight.case.K, G=weight.scales.shape[0]).relative


def triton_error(weight: Weight, dtype: torch.dtype, M: int, device: tiles.Device) -> float:
    """The relative error of gptq_gemm by the form that Triton chooses for M tokens."""
    plan = tiles.plan_gemm(M, weight.op_weight, dtype, device, is_batch_invariant())
    return triton_gemm_error(plan, weight.case.bits, truncates=device.arch != "host").relative
