from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_g_idx_values, check_gptq_gemm_multi
from exllama_ops.reference.gptq_gemm import gptq_gemm


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
    """Reference of `torch.ops.exllama.gptq_gemm_multi`: `gptq_gemm` of every part, side by side."""
    check_gptq_gemm_multi(x, qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    check_g_idx_values("gptq_gemm_multi", g_idx, use_exllama, x.shape[1], scales[0].shape[0])
    parts = [
        gptq_gemm(x, *tensors, g_idx, use_exllama, bit, use_v2_format, group_size)
        for tensors in zip(qweight, qzeros, scales, strict=True)
    ]
    return torch.cat(parts, 1)
