from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_dequantize, check_row_order_values
from exllama_ops.layout.pack import unpack_rows, unpack_zeros
from exllama_ops.layout.weight import Weight, from_op_arguments


@from_op_arguments(Weight)
def gptq_dequantize(weight: Weight) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_dequantize`: ``W[k, n] = scales[g, n] * (q[k, n] - z[g, n])``.

    The product of a half-precision scale (11 significant bits) and ``q - z`` (9) is exact in float32. So the
    only rounding is the one to the scales' dtype. With float32 scales the one rounding is the product's.
    """
    check_gptq_dequantize(weight)
    check_row_order_values("gptq_dequantize", weight, writes_to_its_rows=True)
    W = dequantize_rows(weight, torch.float32)
    places = weight.places
    if places is not None:
        W = W.index_select(0, places)
    return W.to(weight.scales.dtype)


def dequantize_rows(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W in ``dtype``, its rows in the order in which qweight stores them (sorted by group if there is a perm)."""
    q = unpack_rows(weight.qweight, weight.bits, "shuffled" if weight.shuffled else "checkpoint")
    z = unpack_zeros(weight.qzeros, weight.bits, use_v2_format=weight.zero_offset == 0)
    groups = weight.row_groups()
    centered = q - z.index_select(0, groups)
    return centered.to(dtype) * weight.scales.to(dtype).index_select(0, groups)
