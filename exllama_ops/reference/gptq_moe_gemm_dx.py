from __future__ import annotations

from torch import Tensor

from exllama_ops.layout.checks import check_gptq_moe_gemm_dx
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import from_op_arguments
from exllama_ops.reference.gptq_gemm_dx import product_dx
from exllama_ops.reference.gptq_moe_gemm import of_each_expert


@from_op_arguments(Experts)
def gptq_moe_gemm_dx(grad: Tensor, experts: Experts) -> Tensor:
    """Reference of `torch.ops.exllama.gptq_moe_gemm_dx`: `gptq_gemm_dx` of the rows of each expert by its weight."""
    check_gptq_moe_gemm_dx(grad, experts)
    dx = grad.new_zeros((grad.shape[0], experts.in_features))
    return of_each_expert("gptq_moe_gemm_dx", grad, experts, product_dx, dx)
