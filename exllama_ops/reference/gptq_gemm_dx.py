from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_g_idx_values, check_gptq_gemm_dx
from exllama_ops.layout.shuffle import inverse_permutation
from exllama_ops.reference.gptq_dequantize import dequantize_rows


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
    """Reference of `torch.ops.exllama.gptq_gemm_dx`: ``grad @ W.T``, summed in float64, rounded as in `gptq_gemm`."""
    check_gptq_gemm_dx(grad, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    K = qweight.shape[0] * 32 // bit
    check_g_idx_values("gptq_gemm_dx", g_idx, use_exllama, K, scales.shape[0], writes_to_its_rows=True)
    W = dequantize_rows(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size, dtype=torch.float64
    )
    dx = (grad.to(torch.float64) @ W.t()).to(torch.float32).to(grad.dtype)
    if use_exllama and g_idx.numel():
        dx = dx.index_select(1, inverse_permutation(g_idx))
    return dx
