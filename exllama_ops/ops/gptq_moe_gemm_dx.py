"""gptq_moe_gemm_dx: the gradient of gptq_moe_gemm with respect to x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_moe_gemm_dx
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import from_op_arguments
from exllama_ops.ops import _vmap
from exllama_ops.ops._linear import EXPERTS_ARGUMENTS, define_linear_op


def gptq_moe_gemm_dx(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    expert_offsets: Tensor,
    use_exllama: bool,
    bit: int,
    use_v2_format: bool = False,
    group_size: int = 0,
) -> Tensor:
    """``dx[i] = grad[i] @ W[e].T`` for the expert e of row i: the gradient of `gptq_moe_gemm`.

    Each row has the numerics of `gptq_gemm_dx` with its expert's weight. Differentiable with respect to grad (by
    `gptq_moe_gemm`), so second derivatives work.

    Args:
        grad: (M, N) float16, bfloat16 or float32, contiguous, its rows sorted by expert.
        qweight: as in `gptq_moe_gemm`, like every argument that follows.
        qzeros: see `gptq_moe_gemm`.
        scales: see `gptq_moe_gemm`.
        g_idx: see `gptq_moe_gemm`.
        expert_offsets: see `gptq_moe_gemm`.
        use_exllama: see `gptq_moe_gemm`.
        bit: see `gptq_moe_gemm`.
        use_v2_format: see `gptq_moe_gemm`.
        group_size: see `gptq_moe_gemm`.

    Returns:
        (M, K) in grad's dtype, contiguous, its columns in the order of x's. A row of no expert is 0.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong, or on a CPU an offset or a value of g_idx.

    Source: `exllama_ops.reference.gptq_moe_gemm_dx`.
    """
    return _call(grad, qweight, qzeros, scales, g_idx, expert_offsets, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Experts)
def fake_gptq_moe_gemm_dx(grad: Tensor, experts: Experts) -> Tensor:
    check_gptq_moe_gemm_dx(grad, experts)
    return grad.new_empty((grad.shape[0], experts.in_features))


def _product(grad: Tensor, *experts: Any) -> Tensor:
    result: Tensor = torch.ops.exllama.gptq_moe_gemm(grad, *experts)
    return result


_call = define_linear_op(
    "gptq_moe_gemm_dx",
    f"Tensor grad, {EXPERTS_ARGUMENTS}",
    adjoint=_product,
    fake=fake_gptq_moe_gemm_dx,
    kind=Experts,
    vmap=_vmap.one_by_one,
)
