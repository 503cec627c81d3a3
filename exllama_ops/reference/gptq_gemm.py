from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_g_idx_values, check_gptq_gemm
from exllama_ops.reference.gptq_dequantize import dequantize_rows


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
    """Reference of `torch.ops.exllama.gptq_gemm`: ``x @ W``, summed in float64, rounded to float32 and x's dtype."""
    check_gptq_gemm(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    check_g_idx_values("gptq_gemm", g_idx, use_exllama, x.shape[1], scales.shape[0])
    W = dequantize_rows(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size, dtype=torch.float64
    )
    if use_exllama and g_idx.numel():
        x = x.index_select(1, g_idx)
    return (x.to(torch.float64) @ W).to(torch.float32).to(x.dtype)
