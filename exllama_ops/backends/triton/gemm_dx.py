"""gptq_gemm_dx: grad @ W.T, a tl.dot in float32 with scale * (q - z), since scales vary along the sum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.arguments import constants, groups_of, new_rows, pointers, sizes, without_order
from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.tiles import DxPlan, check_width, device_of, plan_dx
from exllama_ops.backends.triton.tuned_tiles import tuned
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights, rows_of
from exllama_ops.layout.checks import check_gptq_gemm_dx
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.weight import Weight, from_op_arguments


@triton.jit(do_not_specialize=["M", "G", "group_size"])
def gemm_dx_kernel(
    grad_ptr: tl.tensor,  # (M, N)
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (M, K)
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    BLOCK_K: tl.constexpr = BLOCK_B * VALUES
    row_tiles = tl.cdiv(K, BLOCK_K)
    first_block = tl.program_id(0) % row_tiles * BLOCK_B
    offs_m = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = first_block * VALUES + tl.arange(0, BLOCK_K)
    blocks = first_block + tl.arange(0, BLOCK_B)
    mask_m, mask_k = offs_m < M, offs_k < K
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        offs_n = first_n + tl.arange(0, BLOCK_N)
        weights, _ = load_weights(
            qweight_ptr, qzeros_ptr, scales_ptr, row_order_ptr, blocks, offs_n, blocks < K // VALUES, offs_n < N, N, G,
            group_size, BITS, SHUFFLED, ZERO_OFFSET, HAS_ROW_ORDER, GROUPS_OF, True,
        )  # fmt: skip
        grad = tl.load(grad_ptr + offs_m[:, None] * N + offs_n[None, :], mask_m[:, None] & (offs_n < N)[None, :], 0)
        w = rows_of(weights, tl.float32, BLOCK_B, BLOCK_N)
        total = tl.dot(grad.to(tl.float32), tl.trans(w), total, input_precision="ieee")
    columns = offs_k
    if HAS_ROW_ORDER and SHUFFLED:
        columns = checked_rows(row_order_ptr, offs_k, mask_k, K)
    ptrs = out_ptr + offs_m[:, None] * K + columns[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask_m[:, None] & mask_k[None, :])


def compute_dx(plan: DxPlan, grad: Tensor, weight: Weight) -> Tensor:
    """``grad @ W.T`` by a plan; M > 0."""
    M, tile = grad.shape[0], plan.tile
    out = new_rows(weight, (M, weight.K), kernel_dtype(grad.dtype))
    launch(
        gemm_dx_kernel,
        (triton.cdiv(weight.K, tile.block_n) * triton.cdiv(M, tile.block_m),),
        {"grad_ptr": grad, **pointers(weight), "out_ptr": out},
        {"M": M, **sizes(weight)},
        {
            **constants(weight),
            "GROUPS_OF": groups_of(weight, tile.block_n),
            "BLOCK_M": tile.block_m,
            "BLOCK_B": tile.block_n // FORMATS[weight.bits].block_values,
            "BLOCK_N": plan.step,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out.to(grad.dtype)


@from_op_arguments(Weight)
def gptq_gemm_dx(grad: Tensor, weight: Weight) -> Tensor:
    """`torch.ops.exllama.gptq_gemm_dx` in Triton."""
    check_gptq_gemm_dx(grad, weight)
    check_width("gptq_gemm_dx", weight.bits)
    if grad.shape[0] == 0:
        return grad.new_empty(0, weight.in_features)
    if weight.is_filled:
        return _gemm_dx(grad, without_order(weight)).index_select(1, weight.row_order[weight.K :])
    return _gemm_dx(grad, weight)


def _gemm_dx(grad: Tensor, weight: Weight) -> Tensor:
    plan = plan_dx(weight.bits, device_of(grad.device))
    return compute_dx(tuned(plan, grad.shape[0], weight, grad.device), grad, weight)
