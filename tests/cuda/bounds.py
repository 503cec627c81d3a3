"""The errors that the CUDA kernels declare, by algorithm: of a sum, relative to |x| |W|, before its rounding."""

from __future__ import annotations

import torch

from conformance.bounds import gamma
from conformance.weights import Weight

# Tensor cores cut the terms of a sum off instead of rounding it.
TENSOR_CORE_UNIT = 2.0**-22
# Half a unit in the last place of what kDense rounds W to.
WEIGHT_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def gemm_error(algorithm: str, weight: Weight, dtype: torch.dtype) -> float:
    """Of gptq_gemm by an algorithm.

    The depth of a sum in gemm_scalar is what one warp adds, 64 rows of each stage of 256, a sum per group (or, where
    groups are looked up row by row, one rounding of the weight), four warps and the splits; in gemm_mma, 128 rows of
    every 512. (q - z) and its products with x are exact in both.
    """
    K, G = weight.case.K, int(weight.groups.max()) + 1
    groups = K if weight.case.order == "raw" else G
    splits = -(-K // 256)
    if algorithm == "scalar":
        return gamma(64 * splits + groups + 4 + splits)
    if algorithm == "mma":
        return gamma(128 * -(-K // 512) + groups + 4 + splits, TENSOR_CORE_UNIT)
    if algorithm == "tiled":
        return gamma(K + 2)
    return WEIGHT_ROUNDING[dtype] + gamma(K + 2)


def dx_error(N: int) -> float:
    """Of gptq_gemm_dx: a chain of N, and two roundings of the weight."""
    return gamma(N + 2)
