from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm, check_row_order_values
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.reference.gptq_dequantize import dequantize_rows


@from_op_arguments(Weight)
def gptq_gemm(x: Tensor, weight: Weight) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_gemm`: ``x @ W``, summed in float64, rounded to float32 and x's dtype."""
    check_gptq_gemm(x, weight)
    check_row_order_values("gptq_gemm", weight)
    return product(x, weight)


def product(x: Tensor, weight: Weight) -> Tensor:
    """`gptq_gemm` of arguments that have been checked."""
    W = dequantize_rows(weight, torch.float64)
    if weight.is_filled:
        W = W.index_select(0, weight.row_order[weight.K :])
    elif weight.perm is not None:
        x = x.index_select(1, weight.perm)
    return (x.to(torch.float64) @ W).to(torch.float32).to(x.dtype)
