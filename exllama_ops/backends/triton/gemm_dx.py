"""gptq_gemm_dx: grad @ W.T, a tl.dot in float32 with scale * (q - z), since scales vary along the sum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from exllama_ops.backends.triton.arguments import (
    constants,
    constants_of_experts,
    groups_of,
    new_rows,
    offsets_of,
    pointers,
    sizes,
    without_order,
)
from exllama_ops.backends.triton.experts import place_of, pointers_of, row_tiles
from exllama_ops.backends.triton.launch import kernel_dtype, launch
from exllama_ops.backends.triton.tiles import DxPlan, check_width, device_of, plan_dx, rows_of_each
from exllama_ops.backends.triton.tuned_tiles import tuned
from exllama_ops.backends.triton.unpack import block_values, checked_rows, load_weights, rows_of
from exllama_ops.layout.checks import check_gptq_gemm_dx, check_gptq_moe_gemm_dx
from exllama_ops.layout.experts import Experts
from exllama_ops.layout.formats import FORMATS
from exllama_ops.layout.weight import Weight, from_op_arguments


@triton.jit(do_not_specialize=["M", "G", "group_size", "in_features"])
def gemm_dx_kernel(
    grad_ptr: tl.tensor,  # (M, N)
    qweight_ptr: tl.tensor,
    qzeros_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    expert_offsets_ptr: tl.tensor,  # (E + 1,), None if E is 0: of one weight
    out_ptr: tl.tensor,  # (M, K), or (M, in_features) if FILLED
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    group_size: tl.tensor,
    in_features: tl.tensor,
    BITS: tl.constexpr,
    SHUFFLED: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    HAS_ROW_ORDER: tl.constexpr,
    FILLED: tl.constexpr,
    E: tl.constexpr,
    GROUPS_OF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    VALUES: tl.constexpr = block_values(BITS)
    BLOCK_K: tl.constexpr = BLOCK_B * VALUES
    row_tiles = tl.cdiv(K, BLOCK_K)
    first_block = tl.program_id(0) % row_tiles * BLOCK_B
    _split, _tile, expert, first_m, end_m = place_of(
        expert_offsets_ptr, tl.program_id(0) // row_tiles, tl.cdiv(M, BLOCK_M), 1, M, E, BLOCK_M
    )
    sum_columns, out_columns = N, in_features if FILLED else K
    if E > 0:
        sum_columns = tl.where(expert < 0, 0, N)
        qweight_ptr, qzeros_ptr, scales_ptr = pointers_of(expert, qweight_ptr, qzeros_ptr, scales_ptr, K, N, G, BITS)
        row_order_ptr += expert.to(tl.int64) * (K + in_features if FILLED else K)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = first_block * VALUES + tl.arange(0, BLOCK_K)
    blocks = first_block + tl.arange(0, BLOCK_B)
    mask_m, mask_k = offs_m < end_m, offs_k < K
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, sum_columns, BLOCK_N):
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
        has_weight = offs_k < (K if E == 0 else tl.where(expert < 0, 0, K))
        columns = checked_rows(row_order_ptr, offs_k, has_weight, out_columns, -1 if FILLED else 0)
        columns = tl.where(has_weight, columns, offs_k)
        mask_k = mask_k & (columns >= 0) & (columns < out_columns)
    ptrs = out_ptr + offs_m[:, None] * out_columns + columns[None, :]
    tl.store(ptrs, total.to(out_ptr.dtype.element_ty), mask_m[:, None] & mask_k[None, :])


def compute_dx(plan: DxPlan, grad: Tensor, weight: Weight, experts: Experts | None = None) -> Tensor:
    """``grad @ W.T`` by a plan; M > 0. Of experts, the one weight is that of any of them, and only it may be filled."""
    M, tile, E = grad.shape[0], plan.tile, experts.E if experts else 0
    out = new_rows(weight, (M, weight.in_features), kernel_dtype(grad.dtype))
    launch(
        gemm_dx_kernel,
        (triton.cdiv(weight.K, tile.block_n) * row_tiles(M, E, tile.block_m),),
        {"grad_ptr": grad, **pointers(experts or weight), **offsets_of(experts), "out_ptr": out},
        {"M": M, **sizes(weight), "in_features": weight.in_features},
        {
            **constants(weight),
            **constants_of_experts(experts),
            "FILLED": weight.is_filled,
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


@from_op_arguments(Experts)
def gptq_moe_gemm_dx(grad: Tensor, experts: Experts) -> Tensor:
    """`torch.ops.exllama.gptq_moe_gemm_dx` in Triton."""
    check_gptq_moe_gemm_dx(grad, experts)
    check_width("gptq_moe_gemm_dx", experts.bits)
    M, E, weight = grad.shape[0], experts.E, experts[0]
    if M == 0:
        return grad.new_empty(0, weight.in_features)
    plan = tuned(plan_dx(weight.bits, device_of(grad.device)), rows_of_each(M, E), weight, grad.device)
    return compute_dx(plan, grad, weight, experts)


def _gemm_dx(grad: Tensor, weight: Weight) -> Tensor:
    plan = plan_dx(weight.bits, device_of(grad.device))
    return compute_dx(tuned(plan, grad.shape[0], weight, grad.device), grad, weight)
