"""gptq_gemm: activations times a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.ops._linear import WEIGHT_ARGUMENTS, define_linear_op


def gptq_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """``out = x @ W`` with ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``: sums in at least float32, one rounding.

    Differentiable with respect to x (by `gptq_gemm_dx`); the weight gets no gradient. NaN and inf in x propagate.
    The values of g_idx must lie in [0, G), or be a permutation of the rows, or the two lists of a filled weight. On a
    CPU one outside is refused; on a GPU, where the host reads none, it stops the kernel.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous, M >= 0.
        qweight: (K * bit / 32, N) int32, contiguous, K and N filling whole words (multiples of 16, 32, 8, 4 for 2, 3,
            4, 8 bits). Shuffled by `gptq_shuffle` if use_exllama, else in checkpoint order.
        qzeros: (G, N * bit / 32) int32, in checkpoint order; ``z = stored + (0 if use_v2_format else 1)``, not wrapped
            into ``bit`` bits.
        scales: (G, N) float16, bfloat16 or float32, whatever x is; taken exactly.
        g_idx: int32. If use_exllama, the permutation that the weight was shuffled with, (K,); else the group of each
            row, (K,), of any content. Empty for no permutation, or for the groups ``k // group_size``. A filled weight
            has more rows of values, R, and (R + K,) entries. The first R say which column of x each row multiplies, or
            -1 for none. The others say where each column's row is.
        use_exllama: whether qweight is shuffled.
        bit: 2, 3, 4 or 8.
        use_v2_format: whether qzeros stores zero points, not zero points minus one.
        group_size: rows of a group. 0 for K / G, which must be whole; a weight with a partial last group,
            G = ceil(K / group_size), must say it, and a filled one has ceil(R / group_size) or more. Not
            looked at where a raw g_idx gives the groups.

    Returns:
        (M, N) in x's dtype, contiguous, new memory. A float16 result beyond 65504 is inf. On a CPU nothing overflows
        before that rounding, and NaN and inf of scales propagate too. On a GPU nothing overflows while each
        ``abs(W)``, each group's sum of ``abs(x) * 2**bit`` and each result's sum of ``abs(x * W)`` are below 2**127.
        With some hundred rows of x in 16 bits CUDA may round W to their dtype first, as a dense layer has it; in
        float16 ``abs(W)`` must then be below 65504.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong, or on a CPU a value of g_idx.

    Source: `exllama_ops.reference.gptq_gemm`.
    """
    return _call(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Weight)
def fake_gptq_gemm(x: Tensor, weight: Weight) -> Tensor:
    check_gptq_gemm(x, weight)
    return x.new_empty((x.shape[0], weight.N))


def _dx(grad: Tensor, *weight: Any) -> Tensor:
    result: Tensor = torch.ops.exllama.gptq_gemm_dx(grad, *weight)
    return result


_call = define_linear_op("gptq_gemm", f"Tensor x, {WEIGHT_ARGUMENTS}", adjoint=_dx, fake=fake_gptq_gemm)
