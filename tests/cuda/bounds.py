"""What `exllama_ops.testing.errors` declares for the CUDA kernels, asked for by the weights of the tests."""

from __future__ import annotations

import torch

from conformance.weights import Weight
from exllama_ops.testing.errors import cuda_dx_error, cuda_gemm_error


def gemm_error(algorithm: str, weight: Weight, dtype: torch.dtype) -> float:
    """The relative error of gptq_gemm by an algorithm."""
    G = int(weight.groups.max()) + 1
    return cuda_gemm_error(algorithm, dtype, K=weight.rows, G=G, by_row=weight.case.order == "raw").relative


def dx_error(N: int, algorithm: str = "tiled") -> float:
    """The relative error of gptq_gemm_dx."""
    return cuda_dx_error(algorithm, N).relative
