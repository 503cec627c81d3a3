"""gptq_moe_gemm: activations that are sorted by expert times the quantized weight of each expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exllama_ops.layout.checks import check_gptq_moe_gemm
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.weight import from_op_arguments
from exllama_ops.ops import _vmap
from exllama_ops.ops._linear import EXPERTS_ARGUMENTS, define_linear_op


def gptq_moe_gemm(
    x: Tensor,
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
    """``out[i] = x[i] @ W[e]`` for the expert e with ``expert_offsets[e] <= i < expert_offsets[e + 1]``.

    Each row has the numerics of `gptq_gemm` with its expert's weight, and on a CPU the bits. A row of no expert is 0.
    The weights of experts without rows are not read. Differentiable with respect to x (by `gptq_moe_gemm_dx`); the
    weights get no gradient. The offsets are not read on the host where x is on a GPU.

    Args:
        x: (M, K), as in `gptq_gemm`, its rows sorted by expert.
        qweight: (E, K * bit / 32, N) int32, contiguous: the weight of each expert, as in `gptq_gemm`.
        qzeros: (E, G, N * bit / 32) int32.
        scales: (E, G, N) float16, bfloat16 or float32.
        g_idx: (E, entries) int32, of each expert what `gptq_gemm` takes; or empty, (0,), for none.
        expert_offsets: (E + 1,) int32, which do not decrease, from 0 or more to M or fewer. On a CPU others are
            refused; on a GPU, where the host reads none, they stop the kernel.
        use_exllama: see `gptq_gemm`, and likewise what follows; all experts have the same.
        bit: see `gptq_gemm`.
        use_v2_format: see `gptq_gemm`.
        group_size: see `gptq_gemm`.

    Returns:
        (M, N) in x's dtype, contiguous, new memory.

    Raises:
        ValueError: a shape, dtype, device, stride or option is wrong, or on a CPU an offset or a value of g_idx.

    Source: `exllama_ops.reference.gptq_moe_gemm`.
    """
    return _call(x, qweight, qzeros, scales, g_idx, expert_offsets, use_exllama, bit, use_v2_format, group_size)


@from_op_arguments(Experts)
def fake_gptq_moe_gemm(x: Tensor, experts: Experts) -> Tensor:
    check_gptq_moe_gemm(x, experts)
    return x.new_empty((x.shape[0], experts.N))


def _dx(grad: Tensor, *experts: Any) -> Tensor:
    result: Tensor = torch.ops.exllama.gptq_moe_gemm_dx(grad, *experts)
    return result


_call = define_linear_op(
    "gptq_moe_gemm",
    f"Tensor x, {EXPERTS_ARGUMENTS}",
    adjoint=_dx,
    fake=fake_gptq_moe_gemm,
    kind=Experts,
    vmap=_vmap.one_by_one,
)
