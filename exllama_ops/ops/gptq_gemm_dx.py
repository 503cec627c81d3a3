"""gptq_gemm_dx: the gradient of gptq_gemm with respect to x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm_dx
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.ops._linear import WEIGHT_ARGUMENTS, define_linear_op


def gptq_gemm_dx(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """``dx = grad @ W.T``, the gradient of `gptq_gemm`: sums in at least float32 of an unrounded W, one rounding.

    Differentiable with respect to grad (by `gptq_gemm`), so second derivatives work.

    Args:
        grad: (M, N) float16, bfloat16 or float32, contiguous, M >= 0.
        qweight: as in `gptq_gemm`, like every argument that follows.
        qzeros: see `gptq_gemm`.
        scales: see `gptq_gemm`.
        g_idx: see `gptq_gemm`.
        use_exllama: see `gptq_gemm`.
        bit: see `gptq_gemm`.
        use_v2_format: see `gptq_gemm`.
        group_size: see `gptq_gemm`.

    Returns:
        (M, K) in grad's dtype, contiguous, its columns in the order of x's. On a CPU nothing overflows before the
        final rounding. On a GPU nothing does while each ``abs(W)`` and each result's sum of ``abs(grad * W)`` are
        below 2**127.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong.

    Source: `exllama_ops.reference.gptq_gemm_dx`.
    """
    return _call(grad, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Weight)
def fake_gptq_gemm_dx(grad: Tensor, weight: Weight) -> Tensor:
    check_gptq_gemm_dx(grad, weight)
    return grad.new_empty((grad.shape[0], weight.in_features))


def _product(grad: Tensor, *weight: Any) -> Tensor:
    result: Tensor = torch.ops.exllama.gptq_gemm(grad, *weight)
    return result


_call = define_linear_op("gptq_gemm_dx", f"Tensor grad, {WEIGHT_ARGUMENTS}", adjoint=_product, fake=fake_gptq_gemm_dx)
