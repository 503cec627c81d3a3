from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm_dx, check_row_order_values
from exllama_ops.layout.weight import Weight, from_op_arguments
from exllama_ops.reference.gptq_dequantize import dequantize_rows


@from_op_arguments(Weight)
def gptq_gemm_dx(grad: Tensor, weight: Weight) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_gemm_dx`: ``grad @ W.T``, summed in float64, rounded as in `gptq_gemm`."""
    check_gptq_gemm_dx(grad, weight)
    check_row_order_values("gptq_gemm_dx", weight, writes_to_its_rows=True)
    return product_dx(grad, weight)


def product_dx(grad: Tensor, weight: Weight) -> Tensor:
    """`gptq_gemm_dx` of arguments that have been checked."""
    W = dequantize_rows(weight, torch.float64)
    dx = (grad.to(torch.float64) @ W.t()).to(torch.float32).to(grad.dtype)
    places = weight.places
    if places is not None:
        dx = dx.index_select(1, places)
    return dx
