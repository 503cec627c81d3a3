from __future__ import annotations

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_gemm_multi, check_row_order_values
from exllama_ops.layout.weight import Parts, from_op_arguments
from exllama_ops.reference.gptq_gemm import product


@from_op_arguments(Parts)
def gptq_gemm_multi(x: Tensor, parts: Parts) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_gemm_multi`: `gptq_gemm` of every part, side by side."""
    check_gptq_gemm_multi(x, parts)
    weights = parts.weights
    check_row_order_values("gptq_gemm_multi", weights[0])
    return torch.cat([product(x, weight) for weight in weights], 1)
