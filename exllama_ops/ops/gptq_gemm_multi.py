"""gptq_gemm_multi: the same activations times several quantized weights, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm_multi
from exllama_ops.layout.weight import Parts, from_op_arguments
from exllama_ops.ops._linear import WEIGHTS_ARGUMENTS, define_linear_op


def gptq_gemm_multi(
    x: Tensor,
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """``out = [x @ W[0], x @ W[1], ...]``, the columns side by side; x is gathered and prepared once.

    The columns of a part are those of `gptq_gemm`, bit for bit but on CUDA. There one launch has all parts, and splits
    their sums along K as those of one weight with all columns. In batch-invariant mode a row's bits do not depend on M
    there either. Differentiable with respect to x (by `gptq_gemm_dx` of each part, summed); the weights get no
    gradient.

    Args:
        x: (M, K), as in `gptq_gemm`.
        qweight: of each part, (K * bit / 32, N[i]), as in `gptq_gemm`; at least one part.
        qzeros: of each part, (G, N[i] * bit / 32).
        scales: of each part, (G, N[i]); G is that of all parts, the dtypes may differ.
        g_idx: one for all parts, as in `gptq_gemm`, like the options that follow.
        use_exllama: see `gptq_gemm`.
        bit: see `gptq_gemm`.
        use_v2_format: see `gptq_gemm`.
        group_size: see `gptq_gemm`.

    Returns:
        (M, N[0] + N[1] + ...) in x's dtype, contiguous, new memory.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong; the text names the part.

    Source: `exllama_ops.reference.gptq_gemm_multi`.
    """
    return _call(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Parts)
def fake_gptq_gemm_multi(x: Tensor, parts: Parts) -> Tensor:
    check_gptq_gemm_multi(x, parts)
    return x.new_empty((x.shape[0], sum(weight.N for weight in parts.weights)))


def _sum_of_dx(
    grad: Tensor,
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    *g_idx_and_options: Any,
) -> Tensor:
    grads = grad.split([part.shape[1] for part in qweight], 1)
    first, *others = (
        torch.ops.exllama.gptq_gemm_dx(part.contiguous(), *tensors, *g_idx_and_options)
        for part, *tensors in zip(grads, qweight, qzeros, scales, strict=True)
    )
    dx: Tensor = sum(others, start=first)
    return dx


_call = define_linear_op(
    "gptq_gemm_multi", f"Tensor x, {WEIGHTS_ARGUMENTS}", adjoint=_sum_of_dx, fake=fake_gptq_gemm_multi
)
