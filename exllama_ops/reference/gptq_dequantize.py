from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_g_idx_values, check_gptq_dequantize
from exllama_ops.layout.groups import row_groups
from exllama_ops.layout.pack import unpack_rows, unpack_zeros
from exllama_ops.layout.shuffle import inverse_permutation


def gptq_dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_dequantize`: ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``.

    The product of a half-precision scale (11 significant bits) and ``q - z`` (9) is exact in float32, so that the
    only rounding is the one to the scales' dtype; with float32 scales it is the product's.
    """
    check_gptq_dequantize(qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size)
    K = qweight.shape[0] * 32 // bit
    check_g_idx_values("gptq_dequantize", g_idx, use_exllama, K, scales.shape[0], writes_to_its_rows=True)
    W = dequantize_rows(
        qweight, qzeros, scales, g_idx, use_exllama, bit, use_v2_format, group_size, dtype=torch.float32
    )
    if use_exllama and g_idx.numel():
        W = W.index_select(0, inverse_permutation(g_idx))
    return W.to(scales.dtype)


def dequantize_rows(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool,
    group_size: int,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """W in ``dtype``, its rows in the order in which qweight stores them (sorted by group if there is a perm)."""
    q = unpack_rows(qweight, bit, "shuffled" if use_exllama else "checkpoint")
    z = unpack_zeros(qzeros, bit, use_v2_format)
    if g_idx.numel() and not use_exllama:
        groups = g_idx
    else:
        groups = row_groups(q.shape[0], scales.shape[0], group_size, q.device)
    centered = q - z.index_select(0, groups)
    return centered.to(dtype) * scales.to(dtype).index_select(0, groups)
